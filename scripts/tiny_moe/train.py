"""The training loop of dense models and those with experts.

Trapezoidal learning rate, held-out evaluation, resumable checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from tiny_moe.checkpoint import (
    has_state,
    load_state,
    load_tensors,
    pack,
    save_state,
    save_tensors,
    unpack,
)
from tiny_moe.data import Dataset, Stream
from tiny_moe.model import (
    DenseConfig,
    ModelConfig,
    TinyModel,
    balance_loss,
    read_config,
    z_loss,
)

EVAL_LENGTH = 512


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
    recent: list[float] = field(default_factory=list)  # losses of steps since the last of those
    evals: list[dict[str, float]] = field(default_factory=list)  # step, mean, one per domain
    best_step: int = 0
    best_tokens: int = 0
    best_loss: float = float("inf")


def make_optimizer(model: TinyModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def stream_loss(model: TinyModel, stream: Stream, max_windows: int | None = None) -> float:
    """Mean next-token loss over windows of the stream, evenly spread when limited."""
    windows = stream.windows(EVAL_LENGTH + 1)
    if max_windows is not None and len(windows) > max_windows:
        windows = windows[torch.linspace(0, len(windows) - 1, max_windows).long()]
    total = 0.0
    for rows in torch.split(windows, 8):
        logits = model(rows[:, :-1]).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())) * len(rows)
    return total / len(windows)


def evaluate(
    model: TinyModel, dataset: Dataset, max_windows: int | None = None
) -> dict[str, float]:
    """Held-out loss of every domain, of chat, and the mean over the domains."""
    model.eval()
    losses = {name: stream_loss(model, s, max_windows) for name, s in dataset.valid.items()}
    mean = sum(losses.values()) / len(losses)
    chat = [stream_loss(model, s, max_windows) for s in dataset.valid_chat.values()]
    model.train()
    return {"mean": mean, **losses, "chat": sum(chat) / len(chat)}


def train_step(
    model: TinyModel, optimizer: torch.optim.Optimizer, rows: Tensor, config: TrainConfig
) -> float:
    """One optimiser step; returns the language-model loss."""
    output = model(rows[:, :-1])
    loss = F.cross_entropy(output.logits.flatten(0, 1), rows[:, 1:].flatten())
    total = loss
    if output.router_logits:
        total = total + config.balance_coefficient * balance_loss(output)
        total = total + config.z_coefficient * z_loss(output)
    torch.autograd.backward(total)
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def load_best(work_dir: Path) -> tuple[TinyModel, Progress, TrainConfig]:
    """Return the model with the best validation loss so far and how it came about."""
    state = load_state(work_dir)
    model = TinyModel(read_config(state["model_config"]))
    model.load_state_dict(load_tensors(work_dir, state["files"]["best"]))
    return model.eval(), Progress(**state["progress"]), TrainConfig(**state["train_config"])


def train(
    model_config: ModelConfig | DenseConfig,
    config: TrainConfig,
    dataset: Dataset,
    work_dir: Path,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train until `config.steps`, from the checkpoint in `work_dir` when there is one.

    stop: asked after every step; True saves the run and returns.
    """
    torch.manual_seed(config.seed)
    model = TinyModel(model_config, config.dropout)
    optimizer = make_optimizer(model, config)
    progress = Progress()
    files: dict[str, str] = {}
    if has_state(work_dir):
        state = load_state(work_dir)
        files, progress = state["files"], Progress(**state["progress"])
        unpack(load_tensors(work_dir, files["run"]), model, optimizer)
    started = time.monotonic() - progress.elapsed_s

    def save() -> None:
        progress.elapsed_s = time.monotonic() - started
        files["run"] = save_tensors(work_dir, "run", progress.step, pack(model, optimizer))
        configs = {"model_config": asdict(model_config), "train_config": asdict(config)}
        save_state(work_dir, files, {"progress": asdict(progress), **configs})

    bar = tqdm(total=config.steps, initial=progress.step, desc="training", unit="step")
    while progress.step < config.steps:
        rate = config.rate(progress.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = dataset.batch(config.seed, progress.step, config.batch_tokens, config.chat_share)
        progress.recent.append(train_step(model, optimizer, rows, config))
        progress.step += 1
        progress.tokens += rows[:, 1:].numel()
        bar.update()
        if progress.step % 20 == 0:
            mean = sum(progress.recent) / len(progress.recent)
            progress.losses.append([progress.step, mean, rate])
            bar.set_postfix(loss=f"{mean:.3f}")
            progress.recent = []
        if progress.step % config.eval_every == 0 or progress.step == config.steps:
            losses = evaluate(model, dataset, max_windows=24)
            progress.evals.append({"step": progress.step, **losses})
            bar.write(f"step {progress.step}: " + _format(losses))
            if losses["mean"] < progress.best_loss:
                progress.best_loss = losses["mean"]
                progress.best_step, progress.best_tokens = progress.step, progress.tokens
                files["best"] = save_tensors(work_dir, "best", progress.step, model.state_dict())
            save()
        elif stop():
            save()
            break
    bar.close()


def _format(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
