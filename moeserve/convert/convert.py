"""The conversion: one layer after the other, from the dense files to the new ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve.convert.calibration import Calibration
from moeserve.convert.converted import ConvertedLayer, copied, layer_sources
from moeserve.convert.dense import EMBEDDING, DenseModel
from moeserve.convert.glm import make_gate
from moeserve.convert.measure import judge, measure_perplexity
from moeserve.convert.methods import LayerSample, Split, split_layer
from moeserve.convert.refit import refit_down
from moeserve.convert.routers import ROUTERS, LinearRouter, chosen_experts, expert_norms
from moeserve.convert.run_layers import LayerRunner, product
from moeserve.convert.settings import ConvertSettings, MoeShape
from moeserve.convert.shards import write_safetensors
from moeserve.convert.tune import Tuning
from moeserve.convert.workplace import State, Workplace
from moeserve.core import ModelError
from moeserve.models.packed_model import config_sha256

#: of the work directory, tuning included: what another version left cannot be taken up
FORMAT = 2

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Quality:
    """Perplexities on the calibration text that was held back; mean agreement of the router."""

    dense_perplexity: float
    perplexity: float
    agreement: float


@dataclass(frozen=True)
class Conversion:
    """What came of it. reports: per layer. pregate_recall: by layer, where it was asked for.
    tuning: where it was tuned; quality is that of the tuned model then, reports are from before.
    notes: what whoever uses the model should know."""

    shape: MoeShape
    quality: Quality
    reports: list[dict[str, float]]
    seconds: float
    num_bytes: int
    pregate_recall: tuple[float, ...] = ()
    tuning: Tuning | None = None
    notes: tuple[str, ...] = ()


def recipe(model: DenseModel, settings: ConvertSettings, text: Calibration) -> dict[str, Any]:
    """Whatever decides the bits of the result, and whether unfinished work can be taken up."""
    files = sorted({model.checkpoint.file(name) for name in model.checkpoint.names()})
    return {
        "format": FORMAT,
        "model": model.name,
        "config_sha256": config_sha256(model.path),
        "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
        **asdict(settings),
        "shared_share": "auto" if settings.shared_share is None else settings.shared_share,
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
    sources = {name: copied(model.checkpoint, name) for name in ends}
    write_safetensors(workplace.shard(total + 1, total + 1), sources)
    model.checkpoint.check_unchanged()
    mean = sum(report["agreement"] for report in state.reports) / total
    windows = text.held_back
    quality = Quality(
        measure_perplexity(model, state.hidden["dense"][text.held_back_rows], windows),
        measure_perplexity(model, state.hidden["moe"], windows),
        mean,
    )
    seconds = sum(report["seconds"] for report in state.reports)
    return Conversion(shape, quality, state.reports, seconds, 0)


def _embed(model: DenseModel, text: Calibration) -> dict[str, Tensor]:
    """dense: the stream of the dense model for all of the text; moe: of the converted one, for
    what is held back. Both [T, H] float32."""
    table = model.checkpoint.read(EMBEDDING)
    dense = F.embedding(text.token_ids, table).float()
    model.checkpoint.release(EMBEDDING)
    _check_size(model, EMBEDDING, dense.norm())
    return {"dense": dense, "moe": dense[text.held_back_rows]}


def _convert_layer(
    model: DenseModel,
    settings: ConvertSettings,
    shape: MoeShape,
    text: Calibration,
    workplace: Workplace,
    state: State,
) -> State:
    started = time.monotonic()
    index, total = state.num_layers, model.spec.num_layers
    runner = LayerRunner(model, index, text.window_tokens)
    after, normed = runner.attend(state.hidden["dense"])
    own = f"model.layers.{index}."
    _check_size(model, own, after.norm())
    activations = runner.ffn.activations(normed)
    rows = text.learnt_rows
    sample = LayerSample.of(runner.ffn, normed[rows], activations[rows])
    _check_size(model, own, sample.cost)
    split = split_layer(sample, settings, shape, index)
    dtype = model.checkpoint.dtype(f"model.layers.{index}.mlp.gate_proj.weight")
    router = _fit(settings, shape, split, sample)
    gate = make_gate(router, shape.num_routed, split.always_on, sample.normed, dtype)
    layer = ConvertedLayer(shape, split, gate, None)
    if settings.refit and not shape.all_active:
        fitted = refit_down(sample, layer.weights(sample.normed)).to(dtype)
        layer = replace(layer, down=fitted)
    del sample
    rows = text.held_back_rows
    held = LayerSample.of(runner.ffn, normed[rows], activations[rows])
    report = judge(router, layer, held)
    del held
    dense = after + product(activations, runner.ffn.down)
    _check_size(model, own, dense.norm())
    del after, normed, activations
    after, normed = runner.attend(state.hidden["moe"])
    moe = after + layer.output(runner.ffn, normed, runner.ffn.activations(normed))
    shard = workplace.shard(index + 1, total + 1)
    write_safetensors(shard, layer_sources(model.checkpoint, index, layer))
    report |= {
        "always_on": float(split.always_on + shape.num_shared),
        "seconds": time.monotonic() - started,
    }
    reports = [*state.reports, report]
    return State(index + 1, {"dense": dense, "moe": moe}, reports)


def _check_size(model: DenseModel, prefix: str, squares: Tensor) -> None:
    """squares: of what the weights of such names give. They are finite, but float32 may be too
    small for what comes of them. Raises ModelError that names the largest of them."""
    if torch.isfinite(squares).all():
        return
    names = [name for name in model.checkpoint.names() if name.startswith(prefix)]
    sizes = {name: float(model.checkpoint.read(name).abs().max()) for name in names}
    largest = max(sizes, key=lambda name: sizes[name])
    raise ModelError(
        f"{model.path}: {prefix.rstrip('.')}: what it computes is too large for squares in float32 "
        f"(at most 3.4e38); its largest weight is {sizes[largest]:.3g}, in {largest}",
        hint="the checkpoint is damaged; fetch it again",
    )


def _fit(
    settings: ConvertSettings, shape: MoeShape, split: Split, sample: LayerSample
) -> LinearRouter | None:
    if shape.all_active:
        return None
    experts = chosen_experts(split)
    norms = expert_norms(sample, experts)
    return ROUTERS[settings.router](sample, experts, norms)
