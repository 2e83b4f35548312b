"""The training loop: trapezoidal learning rate, held-out evaluation, resumable checkpoints."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from tiny_moe.data import Dataset, Stream
from tiny_moe.model import ModelConfig, TinyMoE, balance_loss, z_loss

EVAL_LENGTH = 512
CHECKPOINT = "checkpoint.pt"
BEST_WEIGHTS = "best.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run, beside data and model sizes."""

    steps: int = 1640
    batch_tokens: int = 4096
    chat_share: float = 0.2
    learning_rate: float = 2.5e-3
    warmup_steps: int = 150
    decay_share: float = 0.25  # the last part of the run, in which the rate falls to zero
    weight_decay: float = 0.1
    dropout: float = 0.1
    balance_coefficient: float = 0.005
    z_coefficient: float = 1e-3
    gradient_clip: float = 1.0
    eval_every: int = 200
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, linear decay to zero.

        Constant until the decay, so a run may be shortened while it is under way.
        """
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = (self.steps - step) / (self.steps * self.decay_share)
        return self.learning_rate * max(0.0, min(warm, left))


@dataclass
class Progress:
    """What has happened so far; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    losses: list[list[float]] = field(default_factory=list)  # [step, mean loss, rate]
    evals: list[dict[str, float]] = field(default_factory=list)  # step, mean, one per domain
    best_step: int = 0
    best_tokens: int = 0
    best_loss: float = float("inf")


def make_optimizer(model: TinyMoE, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def stream_loss(model: TinyMoE, stream: Stream, max_windows: int | None = None) -> float:
    """Mean next-token loss over windows of the stream, evenly spread when limited."""
    windows = stream.windows(EVAL_LENGTH + 1)
    if max_windows is not None and len(windows) > max_windows:
        windows = windows[torch.linspace(0, len(windows) - 1, max_windows).long()]
    total = 0.0
    for rows in torch.split(windows, 8):
        logits = model(rows[:, :-1]).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())) * len(rows)
    return total / len(windows)


def evaluate(model: TinyMoE, dataset: Dataset, max_windows: int | None = None) -> dict[str, float]:
    """Held-out loss of every domain, of chat, and the mean over the domains."""
    model.eval()
    losses = {name: stream_loss(model, s, max_windows) for name, s in dataset.valid.items()}
    mean = sum(losses.values()) / len(losses)
    chat = [stream_loss(model, s, max_windows) for s in dataset.valid_chat.values()]
    model.train()
    return {"mean": mean, **losses, "chat": sum(chat) / len(chat)}


def train_step(
    model: TinyMoE, optimizer: torch.optim.Optimizer, rows: Tensor, config: TrainConfig
) -> float:
    """One optimiser step; returns the language-model loss."""
    output = model(rows[:, :-1])
    loss = F.cross_entropy(output.logits.flatten(0, 1), rows[:, 1:].flatten())
    router_loss = config.balance_coefficient * balance_loss(output)
    total = loss + router_loss + config.z_coefficient * z_loss(output)
    torch.autograd.backward(total)
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def save_checkpoint(
    path: Path,
    model: TinyMoE,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: TrainConfig,
) -> None:
    """Write the whole state beside `path`, then rename: a killed run leaves a whole file."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "progress": asdict(progress),
        "train_config": asdict(config),
        "model_config": asdict(model.config),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain values only, no pickled code."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def load_best(work_dir: Path) -> tuple[TinyMoE, Progress, TrainConfig]:
    """Return the model with the best validation loss so far and how it came about."""
    state = load_checkpoint(work_dir / CHECKPOINT)
    model = TinyMoE(ModelConfig(**state["model_config"]))
    model.load_state_dict(load_file(work_dir / BEST_WEIGHTS))
    return model.eval(), Progress(**state["progress"]), TrainConfig(**state["train_config"])


def train(model_config: ModelConfig, config: TrainConfig, dataset: Dataset, work_dir: Path) -> None:
    """Train until `config.steps`, from the checkpoint in `work_dir` when there is one."""
    torch.manual_seed(config.seed)
    model = TinyMoE(model_config, config.dropout)
    optimizer = make_optimizer(model, config)
    progress = Progress()
    if (work_dir / CHECKPOINT).exists():
        state = load_checkpoint(work_dir / CHECKPOINT)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        progress = Progress(**state["progress"])
    started = time.monotonic() - progress.elapsed_s
    recent: list[float] = []
    bar = tqdm(total=config.steps, initial=progress.step, desc="training", unit="step")
    while progress.step < config.steps:
        rate = config.rate(progress.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = dataset.batch(config.seed, progress.step, config.batch_tokens, config.chat_share)
        recent.append(train_step(model, optimizer, rows, config))
        progress.step += 1
        progress.tokens += rows[:, 1:].numel()
        bar.update()
        if progress.step % 20 == 0:
            progress.losses.append([progress.step, sum(recent) / len(recent), rate])
            bar.set_postfix(loss=f"{progress.losses[-1][1]:.3f}")
            recent = []
        if progress.step % config.eval_every == 0 or progress.step == config.steps:
            losses = evaluate(model, dataset, max_windows=24)
            progress.evals.append({"step": progress.step, **losses})
            bar.write(f"step {progress.step}: " + _format(losses))
            if losses["mean"] < progress.best_loss:
                progress.best_loss = losses["mean"]
                progress.best_step, progress.best_tokens = progress.step, progress.tokens
                save_file(model.state_dict(), work_dir / BEST_WEIGHTS)
            progress.elapsed_s = time.monotonic() - started
            save_checkpoint(work_dir / CHECKPOINT, model, optimizer, progress, config)
    bar.close()


def _format(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
