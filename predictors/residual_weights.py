"""The trained parts of gate_residual, and the files they are kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from moeserve.core import ConfigError
from moeserve.predictors.gates import LayerGate

#: beside the model
PREDICTORS_FILE = "predictors.safetensors"
FORMAT = "moeserve predictors"
VERSION = 1


@dataclass(frozen=True)
class ResidualShape:
    """Sizes of what is learnt. expert_rank: per expert; context_rank: of the rest."""

    depth: int = 2
    expert_rank: int = 16
    context_rank: int = 64

    def __post_init__(self) -> None:
        for name, least in (("depth", 1), ("expert_rank", 1), ("context_rank", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name}: {value} is below the minimum {least}", field=name)


@dataclass(frozen=True)
class ResidualWeights:
    """What one layer sees of its D next ones. H hidden size, E experts, U expert rank, R context
    rank; all float32. D * E outputs: the E experts of the next layer, then of the one after.

    linear [D * E, H + E] and bias [D * E]: gates with the linear part of the correction in them; of
    the unit state and of the experts' weights.
    expert_in [E, U, H], expert_bias [E, U], expert_out [E, U, D * E]: what each expert adds.
    here [R, H + E], past [R, H], past_next [R, H], context_bias [R], context_out [R, D * E]: what
    attention adds, from this row's state and from the states of the token before, in this layer and
    in the next one.
    """

    linear: Tensor
    bias: Tensor
    expert_in: Tensor
    expert_bias: Tensor
    expert_out: Tensor
    here: Tensor
    past: Tensor
    past_next: Tensor
    context_bias: Tensor
    context_out: Tensor

    @property
    def num_experts(self) -> int:
        return self.expert_in.shape[0]

    @property
    def depth(self) -> int:
        return self.linear.shape[0] // self.num_experts


PARTS = tuple(each.name for each in fields(ResidualWeights))


def part_shapes(shape: ResidualShape, hidden: int, experts: int, ahead: int) -> dict[str, Any]:
    """The shape of every part. ahead: layers that are seen, at most the depth."""
    out, unit, rank = ahead * experts, shape.expert_rank, shape.context_rank
    return {
        "linear": (out, hidden + experts),
        "bias": (out,),
        "expert_in": (experts, unit, hidden),
        "expert_bias": (experts, unit),
        "expert_out": (experts, unit, out),
        "here": (rank, hidden + experts),
        "past": (rank, hidden),
        "past_next": (rank, hidden),
        "context_bias": (rank,),
        "context_out": (rank, out),
    }


@dataclass(frozen=True)
class TrainedPredictor:
    """All views of a model's gate_residual, by the layer they look from.

    config_sha256: of the config.json of the model it was trained on. facts: how, for people.
    """

    config_sha256: str
    shape: ResidualShape
    views: Mapping[int, ResidualWeights]
    facts: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Writes `path` (safetensors) and the json beside it, each as a whole, the json last."""
        tensors = {
            f"{layer}.{name}": getattr(view, name).contiguous()
            for layer, view in sorted(self.views.items())
            for name in PARTS
        }
        about = {
            "format": FORMAT,
            "version": VERSION,
            "config_sha256": self.config_sha256,
            "depth": self.shape.depth,
            "expert_rank": self.shape.expert_rank,
            "context_rank": self.shape.context_rank,
            "layers": sorted(self.views),
            "facts": dict(self.facts),
        }
        try:
            written = path.with_name(path.name + ".partial")
            # One entry: the order of several is not the same in every run.
            # safetensors itself writes files that only their owner may read.
            written.write_bytes(save(tensors, metadata={"format": f"{FORMAT} {VERSION}"}))
            written.replace(path)
            written = about_path(path).with_name(about_path(path).name + ".partial")
            written.write_text(json.dumps(about, indent=1) + "\n")
            written.replace(about_path(path))
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written: {error.strerror}", field="out", hint="choose -o FILE"
            ) from error


def about_path(path: Path) -> Path:
    return path.with_suffix(".json")


def load_trained(
    path: Path, config_sha256: str, gates: Mapping[int, LayerGate]
) -> TrainedPredictor:
    """Reads what `save` wrote. gates: the model's, by layer.

    Raises ConfigError naming the file where it is missing, broken, of another version, or was
    trained on another model.
    """
    about = _read_about(path)
    if about.get("config_sha256") != config_sha256:
        raise _refuse(path, "was trained on another model (config.json differs)")
    try:
        shape = ResidualShape(about["depth"], about["expert_rank"], about["context_rank"])
        layers = [int(layer) for layer in about["layers"]]
        tensors = load_file(path)
    except (KeyError, TypeError, ValueError, SafetensorError, OSError) as error:
        raise _refuse(path, f"is broken: {error}") from error
    return TrainedPredictor(
        config_sha256, shape, _views(path, shape, layers, tensors, gates), about.get("facts", {})
    )


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(about_path(path).read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"predictor: there is no {about_path(path)}",
            field="predictor_file",
            hint="make it with `moeserve predictors train`",
        ) from error
    except (OSError, ValueError) as error:
        raise _refuse(about_path(path), f"cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise _refuse(about_path(path), "is no description of predictors")
    if about.get("version") != VERSION:
        raise _refuse(path, f"has version {about.get('version')!r}, this moeserve reads {VERSION}")
    return about


def _views(
    path: Path,
    shape: ResidualShape,
    layers: list[int],
    tensors: Mapping[str, Tensor],
    gates: Mapping[int, LayerGate],
) -> dict[int, ResidualWeights]:
    ranks = {layer: place for place, layer in enumerate(sorted(gates))}
    views = {}
    for layer in layers:
        if layer not in ranks:
            raise _refuse(path, f"has a layer {layer}, which the model has not")
        gate = gates[layer]
        ahead = min(shape.depth, len(ranks) - 1 - ranks[layer])
        expected = part_shapes(shape, gate.weight.shape[1], gate.num_experts, ahead)
        for name, size in expected.items():
            found = tensors.get(f"{layer}.{name}")
            if found is None or tuple(found.shape) != size or found.dtype != torch.float32:
                raise _refuse(path, f"is broken: {layer}.{name} is not float32 {list(size)}")
        views[layer] = ResidualWeights(**{name: tensors[f"{layer}.{name}"] for name in PARTS})
    return views


def _refuse(path: Path, why: str) -> ConfigError:
    hint = "train it again with `moeserve predictors train`"
    return ConfigError(f"predictor: {path} {why}", field="predictor_file", hint=hint)
