"""The model card and its pictures; every figure is computed from the run, none is typed in."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch

from tiny_moe.data import Corpus, Dataset
from tiny_moe.export import Sample
from tiny_moe.model import TinyModel
from tiny_moe.routing import ExpertLoad
from tiny_moe.train import EVAL_LENGTH, Progress, TrainConfig

mpl.use("Agg")
import matplotlib.pyplot as plt

LOSS_PICTURE = "loss_curve.png"
LOAD_PICTURE = "expert_load.png"
SOURCES = {
    "shakespeare": ("Shakespeare's plays (tinyshakespeare)", "public domain"),
    "stories": ("TinyStories validation stories, an excerpt", "CDLA-Sharing-1.0"),
    "python": ("standard library of CPython {version}", "PSF-2.0"),
}
COMMAND = (
    "python scripts/train_tiny_moe.py --shakespeare tinyshakespeare.txt --stories tinystories.txt"
)


@dataclass(frozen=True)
class Facts:
    """Everything the card reports."""

    model: TinyModel
    config: TrainConfig
    progress: Progress
    corpora: list[Corpus]
    dataset: Dataset
    losses: dict[str, float]
    load: ExpertLoad
    samples: list[Sample]
    logit_difference: float
    hardware_note: str


def draw_losses(progress: Progress, path: Path) -> None:
    """Training loss and the held-out loss of every domain over the steps."""
    figure, axes = plt.subplots(figsize=(7, 4))
    steps, losses, _ = zip(*progress.losses, strict=True)
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="training, all domains and chat")
    for name in [key for key in progress.evals[0] if key not in ("step", "mean")]:
        points = [(e["step"], e[name]) for e in progress.evals]
        axes.plot(*zip(*points, strict=True), marker=".", label=f"held out, {name}")
    axes.axvline(progress.best_step, color="0.5", linestyle=":", label="exported step")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_load(load: ExpertLoad, path: Path) -> None:
    """One heat map of layer by expert for every domain, on one colour scale."""
    figure, all_axes = plt.subplots(
        len(load.shares), 1, figsize=(7, 2.3 * len(load.shares)), layout="constrained"
    )
    top = max(float(s.max()) for s in load.shares.values())
    for axes, (name, shares) in zip(all_axes, load.shares.items(), strict=True):
        image = axes.imshow(shares.numpy(), vmin=0, vmax=top, cmap="viridis", aspect="auto")
        axes.set(title=name, xlabel="expert", ylabel="layer", xticks=range(shares.shape[1]))
    figure.colorbar(image, ax=all_axes, label="share of the layer's routed tokens")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_card(facts: Facts, out: Path) -> None:
    """Write both pictures and README.md into the model directory."""
    draw_losses(facts.progress, out / LOSS_PICTURE)
    draw_load(facts.load, out / LOAD_PICTURE)
    sections = [_head(facts), _data(facts), _training(facts), _quality(facts), _routing(facts)]
    card = "\n\n".join([*sections, _samples(facts)]) + "\n"
    (out / "README.md").write_text(card, encoding="utf-8")


def _head(facts: Facts) -> str:
    config = facts.model.config
    total = sum(p.numel() for p in facts.model.parameters())
    inner = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_experts - config.num_experts_per_tok
    active = total - config.num_hidden_layers * idle * inner
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [qwen3_moe, mixture-of-experts]
---

# tiny-moe

A real, trained Mixture-of-Experts language model that is small enough to live in a repository.
It exists to demonstrate and test moeserve without a download. **It is a toy**: it writes text that
looks like its three domains, knows nothing, and should be used for nothing else.

| | |
| --- | --- |
| architecture | `qwen3_moe` (`Qwen3MoeForCausalLM`) |
| parameters | {total:,}, of which {active:,} work on a token |
| layers, experts | {config.num_hidden_layers} MoE layers, {config.num_experts} experts each, \
top-{config.num_experts_per_tok}, each expert {config.hidden_size} to \
{config.moe_intermediate_size} and back |
| attention | {config.num_attention_heads} query heads, {config.num_key_value_heads} key-value \
heads of {config.head_dim} |
| vocabulary, context | {config.vocab_size} byte-level BPE tokens, \
{config.max_position_embeddings} tokens |
| weights | stored in bfloat16, meant to be computed in float32; licence Apache-2.0 |
| checked | logits equal those of transformers on held-out text within \
{facts.logit_difference:.1e} |

Everything below was measured and written by the training script, from the exported weights."""


def _data(facts: Facts) -> str:
    rows = []
    for corpus in facts.corpora:
        source, licence = SOURCES[corpus.name]
        text = "\0".join([*corpus.train, *corpus.valid]).encode()
        rows.append(
            f"| {corpus.name} | {source.format(version=platform.python_version())} | {licence} | "
            f"{len(corpus.train)} / {len(corpus.valid)} | "
            f"{len(facts.dataset.train[corpus.name].tokens):,} / "
            f"{len(facts.dataset.valid[corpus.name].tokens):,} | "
            f"`{hashlib.sha256(text).hexdigest()[:16]}` |"
        )
    chat_tokens = sum(len(s.tokens) for s in facts.dataset.train_chat.values())
    return f"""## Data

| domain | source | licence | documents, train / held out | tokens, train / held out | sha256 |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

A document is a story, a run of speeches or a Python module; every twentieth is held out whole.
Rows are drawn evenly from the domains. {facts.config.chat_share:.0%} of them are chat:
templated requests answered by real text of the same training documents
({chat_tokens:,} tokens in all variants). The hash is over the documents of both splits."""


def _training(facts: Facts) -> str:
    config, progress = facts.config, facts.progress
    flags = {
        "--steps": "steps",
        "--batch-tokens": "batch_tokens",
        "--learning-rate": "learning_rate",
        "--dropout": "dropout",
        "--balance": "balance_coefficient",
        "--eval-every": "eval_every",
        "--seed": "seed",
    }
    changed = [
        f" {flag} {getattr(config, name)}"
        for flag, name in flags.items()
        if getattr(config, name) != getattr(TrainConfig(), name)
    ]
    note = f"{facts.hardware_note}; " if facts.hardware_note else ""
    plain = progress.best_tokens * (1 - config.chat_share) / len(facts.corpora)
    passes = ", ".join(
        f"{name} {plain / len(stream.tokens):.1f}" for name, stream in facts.dataset.train.items()
    )
    return f"""## Training

```
{COMMAND}{"".join(changed)}
```

- {progress.best_step} steps of {config.batch_tokens} tokens, {progress.best_tokens:,} tokens in \
all: the lowest mean held-out loss
  among {progress.step} steps run of {config.steps} planned.
- Expected passes over the plain text: {passes}.
- AdamW (0.9, 0.95), rate {config.learning_rate} with {config.warmup_steps} warm-up steps and a \
linear decay to zero over the last {config.decay_share:.0%}, weight decay {config.weight_decay},
  gradient clip {config.gradient_clip}, dropout {config.dropout}; rows of 256, 512 and 1024 tokens.
- Router: load-balancing loss per layer × {config.balance_coefficient}, \
z-loss × {config.z_coefficient}.
- {progress.elapsed_s / 60:.0f} minutes of wall time on {_cpu_name()} ({os.cpu_count()} logical \
CPUs), no GPU; {note}torch {torch.__version__}, float32."""


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _quality(facts: Facts) -> str:
    rows = [
        f"| {name} | {loss:.3f} | {math.exp(loss):.1f} |"
        for name, loss in facts.losses.items()
        if name != "mean"
    ]
    return f"""## Held-out loss

Nats per token over all held-out windows of {EVAL_LENGTH} tokens; tokens differ in length between
domains, so compare a domain with itself only. `chat` is the mean over the domains' chat samples.

| domain | loss | perplexity |
| --- | --- | --- |
{chr(10).join(rows)}

![loss over steps]({LOSS_PICTURE})"""


def _routing(facts: Facts) -> str:
    load = facts.load
    pooled = load.pooled
    distances = load.distances()
    pairs = list(distances)
    head = " | ".join(f"TV {a} – {b}" for a, b in pairs)
    rows = [
        f"| {layer} | {entropy:.3f} | {float(pooled[layer].min()):.3f} – "
        f"{float(pooled[layer].max()):.3f} | "
        + " | ".join(f"{distances[pair][layer]:.2f}" for pair in pairs)
        + " |"
        for layer, entropy in enumerate(load.normalised_entropy())
    ]
    means = " | ".join(f"{sum(distances[p]) / len(distances[p]):.2f}" for p in pairs)
    entropies = load.normalised_entropy()
    floors = ", ".join(f"{name} {value:.2f}" for name, value in load.half_distance.items())
    repeats = ", ".join(f"{name} {value:.2f}" for name, value in load.repeat.items())
    counts = ", ".join(f"{name} {value:,}" for name, value in load.num_tokens.items())
    config = facts.model.config
    return f"""## Expert load

Share of a layer's routed tokens that each expert gets, on held-out text ({counts} tokens).
Entropy is that of the mean load of the domains, divided by the log of the number of experts:
1 is uniform. TV is the total-variation distance between the loads of two domains: the share of
the load that would have to move to make them equal.

| layer | entropy | least – most used expert | {head} |
| --- | --- | --- | {" | ".join("---" for _ in pairs)} |
{chr(10).join(rows)}
| mean | {sum(entropies) / len(entropies):.3f} | | {means} |

- TV between the two halves of one domain's own held-out text, for comparison: {floors}.
- Share of a token's experts that the token before it also used: {repeats} \
(random: {config.num_experts_per_tok / config.num_experts:.2f}).

![expert load per layer and domain]({LOAD_PICTURE})"""


def _samples(facts: Facts) -> str:
    parts = ["## Samples\n\nWritten by transformers with the defaults of generation_config.json, "]
    parts[0] += f"seed {facts.config.seed}, first attempt, at most 220 tokens."
    for sample in facts.samples:
        end = "ended by itself" if sample.stopped else "cut off"
        parts.append(
            f"### {sample.title} ({end})\n\nPrompt:\n\n````\n{sample.prompt.rstrip()}\n````\n\n"
            f"Text:\n\n````\n{sample.text.rstrip()}\n````"
        )
    return "\n\n".join(parts)
