"""Trains pregate for a model that was just converted, and says how good it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeserve.convert.calibration import Calibration
from moeserve.convert.dense import EMBEDDING
from moeserve.convert.pregate_layers import WrittenModel
from moeserve.convert.shards import Source, write_safetensors
from moeserve.models.packed_model import config_sha256
from moeserve.predictors.gates import LayerGate
from moeserve.predictors.pregate import PregateShape, PregateWeights
from moeserve.predictors.pregate_file import PREGATE_FILE, TrainedPregate, gate_norms
from moeserve.predictors.pregate_training import PregateText, train_pregate
from moeserve.text_windows import recent_tokens

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Routed:
    """What the routers of all layers chose for the rows of a text. choices: [T, K] of each."""

    gates: tuple[LayerGate, ...]
    choices: tuple[Tensor, ...]


def write_pregate(
    out: Path,
    config: Mapping[str, Any],
    shards: Sequence[Path],
    text: Calibration,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Writes the file beside the model, of which config.json and all shards are there.

    Returns its recall by layer on the text that was held back: of the k experts that a token
    chooses there, the share that are among the k likeliest. Raises ConfigError.
    """
    with WrittenModel.open(out, config, shards) as model:
        routed = route(model, text, progress)
        embedding = model.checkpoint.read(EMBEDDING)
        trained = train(out, routed, embedding, text, seed, progress)
    recall = held_back_recall(trained.weights, routed, text)
    sources = {name: Source.of(tensor) for name, tensor in trained.tensors().items()}
    write_safetensors(out / PREGATE_FILE, sources, trained.metadata())
    return recall


def route(model: WrittenModel, text: Calibration, progress: Progress) -> Routed:
    """Runs the text through the model, one layer after the other."""
    x = model.embed(text.token_ids)
    gates, choices = [], []
    total = model.spec.num_layers
    for index in range(total):
        progress(f"routing of layer {index + 1} of {total}", index / total)
        run = model.run_layer(index, x, text.window_tokens)
        gates.append(run.gate)
        choices.append(run.choices)
    return Routed(tuple(gates), tuple(choices))


def train(
    out: Path,
    routed: Routed,
    embedding: Tensor,
    text: Calibration,
    seed: int,
    progress: Progress,
) -> TrainedPregate:
    """On the part of the text that is to be learnt from. out: has the model's config.json."""
    shape = PregateShape()
    learnt = PregateText(
        text.learnt_from,
        [choices[text.learnt_rows] for choices in routed.choices],
        embedding,
        routed.gates[0].num_experts,
    )
    weights = train_pregate(learnt, shape, seed, lambda share: progress("pregate", share))
    facts = {"tokens": text.learnt_from.numel()}
    layers = tuple(gate.layer for gate in routed.gates)
    norms = gate_norms(routed.gates)
    return TrainedPregate(config_sha256(out), shape, layers, norms, weights, facts)


def held_back_recall(weights: PregateWeights, routed: Routed, text: Calibration) -> list[float]:
    """By layer."""
    recent = recent_tokens(text.held_back, weights.place.shape[1]).flatten(0, 1)
    chances = weights.row_chances(recent.numpy())
    by_layer = torch.from_numpy(chances).unflatten(1, (len(routed.choices), -1))
    shares = []
    for place, choices in enumerate(routed.choices):
        ids = choices[text.held_back_rows].long()
        likeliest = by_layer[:, place].topk(ids.shape[1], dim=1).indices
        shares.append(float((likeliest[..., None] == ids[:, None]).any(2).float().mean()))
    return shares
