"""The conversion: one layer after the other, from the dense files to the new ones."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve.convert.dense import DenseModel
from moeserve.convert.glm import Gate, layer_names, make_gate, router_spec
from moeserve.convert.methods import LayerSample, Split, split_layer
from moeserve.convert.routers import ROUTERS, LinearRouter, agreement, chosen_experts, expert_norms
from moeserve.convert.run_layers import STEP_TOKENS, LayerRunner
from moeserve.convert.settings import ConvertSettings, MoeShape
from moeserve.convert.shards import Source, write_safetensors
from moeserve.convert.workplace import State, Workplace
from moeserve.core import ConfigError
from moeserve.experts.router import Router, RouterWeights
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.packed_model import config_sha256

#: one window in so many is kept back, to measure on
HELD_BACK = 5
MIN_WINDOWS = 5
EMBEDDING = "model.embed_tokens.weight"

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Calibration:
    """windows: [N, W] token ids; every HELD_BACK-th is measured on, the others are learnt from."""

    windows: Tensor

    def __post_init__(self) -> None:
        """Raises ConfigError where there is too little."""
        count, length = self.windows.shape
        if count < MIN_WINDOWS:
            raise ConfigError(
                f"text: {count} windows of {length} tokens; {MIN_WINDOWS} or more are needed",
                field="text",
                hint="give more text, or a smaller --window",
            )

    def held_back(self) -> Tensor:
        """[N] bool."""
        return torch.arange(len(self.windows)) % HELD_BACK == HELD_BACK - 1

    def rows(self) -> Tensor:
        """[N * W] bool: tokens that are held back."""
        return self.held_back().repeat_interleave(self.windows.shape[1])

    def digest(self) -> str:
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Quality:
    """Perplexities on the calibration text that was held back; mean agreement of the router."""

    dense_perplexity: float
    perplexity: float
    agreement: float


@dataclass(frozen=True)
class Conversion:
    """What came of it. reports: per layer."""

    shape: MoeShape
    quality: Quality
    reports: list[dict[str, float]]
    seconds: float
    num_bytes: int


def recipe(model: DenseModel, settings: ConvertSettings, text: Calibration) -> dict[str, Any]:
    """Whatever decides the bits of the result."""
    files = sorted({model.checkpoint.file(name) for name in model.checkpoint.names()})
    return {
        "model": model.name,
        "config_sha256": config_sha256(model.path),
        "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
        **asdict(settings),
        "text_sha256": text.digest(),
    }


def convert_layers(
    model: DenseModel,
    settings: ConvertSettings,
    text: Calibration,
    workplace: Workplace,
    progress: Progress,
) -> Conversion:
    """Writes all shards but not the index. Goes on where an earlier run was interrupted.

    Memory: a layer in float32, its activations for the text, and hidden states.
    Raises ConfigError, ModelError.
    """
    started = time.monotonic()
    shape = MoeShape.of(settings, model.ffn.intermediate_size)
    total = model.spec.num_layers
    state = workplace.load()
    if state is None:
        state = State(0, _embed(model, text))
    for index in range(state.num_layers, total):
        progress(f"layer {index + 1} of {total}", index / total)
        state = _convert_layer(model, settings, shape, text, workplace, state)
        workplace.save(state)
    progress("vocabulary", 1.0)
    ends = [name for name in model.checkpoint.names() if not name.startswith("model.layers.")]
    ends = [n for n in ends if n != "lm_head.weight" or not model.spec.tie_word_embeddings]
    ends = [n for n in ends if "rotary_emb" not in n]
    sources = {name: _copied(model.checkpoint, name) for name in ends}
    write_safetensors(workplace.shard(total + 1, total + 1), sources)
    model.checkpoint.check_unchanged()
    mean = sum(report["agreement"] for report in state.reports) / total
    windows = text.windows[text.held_back()]
    quality = Quality(
        _perplexity(model, state.hidden["dense"][text.rows()], windows),
        _perplexity(model, state.hidden["moe"], windows),
        mean,
    )
    seconds = time.monotonic() - started
    return Conversion(shape, quality, state.reports, seconds, 0)


def _embed(model: DenseModel, text: Calibration) -> dict[str, Tensor]:
    """dense: the stream of the dense model for all of the text; moe: of the converted one, for
    what is held back. Both [T, H] float32."""
    table = model.checkpoint.read(EMBEDDING)
    dense = F.embedding(text.windows.flatten(), table).float()
    model.checkpoint.release(EMBEDDING)
    return {"dense": dense, "moe": dense[text.rows()]}


def _convert_layer(
    model: DenseModel,
    settings: ConvertSettings,
    shape: MoeShape,
    text: Calibration,
    workplace: Workplace,
    state: State,
) -> State:
    index, total = state.num_layers, model.spec.num_layers
    runner = LayerRunner(model, index, text.windows.shape[1])
    after, normed = runner.attend(state.hidden["dense"])
    activations = runner.ffn.activations(normed)
    held_back = text.rows()
    sample = LayerSample.of(runner.ffn, normed[~held_back], activations[~held_back])
    split = split_layer(sample, settings, shape, index)
    dtype = model.checkpoint.dtype(f"model.layers.{index}.mlp.gate_proj.weight")
    router = _fit(settings, shape, split, sample)
    gate = make_gate(router, split, sample.normed, dtype)
    del sample
    held = LayerSample.of(runner.ffn, normed[held_back], activations[held_back])
    report = _judge(router, split, shape, held)
    del held
    dense = after + _product(activations, runner.ffn.down)
    del after, normed, activations
    moe = _run_converted(runner, split, shape, gate, state.hidden["moe"])
    shard = workplace.shard(index + 1, total + 1)
    write_safetensors(shard, layer_sources(model.checkpoint, index, split, gate))
    reports = [*state.reports, report | {"always_on": float(split.always_on + shape.num_shared)}]
    return State(index + 1, {"dense": dense, "moe": moe}, reports)


def _fit(
    settings: ConvertSettings, shape: MoeShape, split: Split, sample: LayerSample
) -> LinearRouter | None:
    if shape.all_active:
        return None
    experts = chosen_experts(split)
    norms = expert_norms(sample, experts)
    return ROUTERS[settings.router](sample, experts, norms)


def _judge(
    router: LinearRouter | None, split: Split, shape: MoeShape, held: LayerSample
) -> dict[str, float]:
    """agreement with the best choice; chance: that of a choice by dice; lost, lost_best: the mean
    square of what is left out of the FFN's output, over that of the output, by the router's choice
    and by the best one."""
    if router is None:
        return {"agreement": 1.0, "chance": 1.0, "lost": 0.0, "lost_best": 0.0}
    experts = chosen_experts(split)
    k = shape.top_k - split.always_on
    norms, scores = expert_norms(held, experts), router.scores(held.normed)
    output = _product(held.activations, held.ffn.down).square().sum()

    def lost(choice: Tensor) -> float:
        left_out = held.activations * _mask(choice, experts, len(held.cost))
        return float(_product(left_out, held.ffn.down).square().sum() / output)

    idle = len(experts) - k
    return {
        "agreement": agreement(scores, norms, k),
        "chance": k / len(experts),
        "lost": lost(scores.topk(idle, 1, largest=False).indices),
        "lost_best": lost(norms.topk(idle, 1, largest=False).indices),
    }


def _mask(choice: Tensor, experts: Tensor, num_neurons: int) -> Tensor:
    """[T, K] experts to [T, I]: 1 for their neurons."""
    of_neuron = torch.full((num_neurons,), len(experts))
    of_neuron[experts] = torch.arange(len(experts))[:, None]
    chosen = torch.zeros(len(choice), len(experts) + 1).scatter_(1, choice, 1.0)
    return chosen[:, of_neuron]


def _run_converted(
    runner: LayerRunner, split: Split, shape: MoeShape, gate: Gate, x: Tensor
) -> Tensor:
    """The converted layer on its own stream, with the router that is written."""
    after, normed = runner.attend(x)
    spec = router_spec(shape, normed.shape[1])
    routing = Router(spec, RouterWeights(gate.weight.float(), None, gate.correction))(normed)
    weights = torch.zeros(len(normed), shape.num_routed)
    weights.scatter_(1, routing.ids, routing.weights)
    activations = runner.ffn.activations(normed)
    for expert, own in enumerate(split.experts):
        activations[:, own] *= weights[:, expert, None]
    return after + _product(activations, runner.ffn.down)


def _product(activations: Tensor, down: Tensor) -> Tensor:
    return torch.cat([rows @ down.T for rows in activations.split(STEP_TOKENS)])


def _perplexity(model: DenseModel, hidden: Tensor, windows: Tensor) -> float:
    """hidden: [T, H] after the last layer. The vocabulary comes piece by piece, as it lies on
    disk: its weights in float32 may be larger than a layer."""
    hidden = F.rms_norm(hidden, hidden.shape[1:], model.end("norm"), model.spec.norm_eps)
    length = windows.shape[1]
    hidden = hidden.view(-1, length, hidden.shape[1])[:, :-1].flatten(0, 1)
    targets = windows[:, 1:].flatten()
    head = model.checkpoint.read(model.head_name)
    total = torch.full((len(hidden),), -torch.inf, dtype=torch.float64)
    own = torch.zeros(len(hidden), dtype=torch.float64)
    step = max(1, (16 << 20) // head.shape[1])
    for start in range(0, len(head), step):
        rows = head[start : start + step].float()
        inside = (targets >= start) & (targets < start + len(rows))
        for part in torch.arange(len(hidden)).split(STEP_TOKENS // 4):
            logits = (hidden[part] @ rows.T).double()
            total[part] = torch.logaddexp(total[part], logits.logsumexp(1))
            mine = part[inside[part]]
            own[mine] = logits[inside[part]].gather(1, (targets[mine] - start)[:, None])[:, 0]
    model.checkpoint.release(model.head_name)
    return float((total - own).mean().exp())


def layer_sources(
    checkpoint: Checkpoint, index: int, split: Split, gate: Gate
) -> Mapping[str, Source]:
    """The tensors of a converted layer, in the dtypes of the dense one."""
    names = layer_names(index)
    layer = names["layer"]
    sources = {
        name: _copied(checkpoint, name)
        for name in checkpoint.names()
        if name.startswith(layer) and not name.startswith(f"{layer}mlp.") and "rotary" not in name
    }
    sources[f"{names['gate']}weight"] = Source.of(gate.weight)
    sources[f"{names['gate']}e_score_correction_bias"] = Source.of(gate.correction)
    places = [(names["shared"], split.shared)]
    places += [(f"{names['expert']}{number}.", own) for number, own in enumerate(split.experts)]
    for prefix, neurons in places:
        for kind, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            source = f"{layer}mlp.{kind}.weight"
            sources[f"{prefix}{kind}.weight"] = _taken(checkpoint, source, neurons, dim)
    return sources


def _copied(checkpoint: Checkpoint, name: str) -> Source:
    return Source(
        checkpoint.dtype(name),
        checkpoint.shape(name),
        lambda: checkpoint.read(name),
        lambda: checkpoint.release(name),
    )


def _taken(checkpoint: Checkpoint, name: str, neurons: Tensor, dim: int) -> Source:
    shape = list(checkpoint.shape(name))
    shape[dim] = len(neurons)
    return Source(
        checkpoint.dtype(name),
        tuple(shape),
        lambda: checkpoint.read(name).index_select(dim, neurons),
        lambda: checkpoint.release(name),
    )
