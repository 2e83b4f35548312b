"""The file that a trained pregate is kept in: safetensors, all that is said of it in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeserve.core import ConfigError
from moeserve.predictors.gates import LayerGate
from moeserve.predictors.pregate import PARTS, PregateShape, PregateWeights

#: beside the model
PREGATE_FILE = "pregate.safetensors"
#: of the header
ABOUT = "moeserve_pregate"
VERSION = 1
#: [L, E], the norms of the gates' rows: which experts it was trained on, as config.json is the same
#: for every way of cutting one dense model
GATES = "gate_norms"
#: by how much a norm may differ, in means: gates that were quantised do, others hardly by so little
MOST_DIFFERENCE = 0.05


@dataclass(frozen=True)
class TrainedPregate:
    """config_sha256: of the config.json of the model it was trained for. layers: its MoE layers.
    gate_norms: [L, E]. facts: how it was trained and how good it is, for people."""

    config_sha256: str
    shape: PregateShape
    layers: tuple[int, ...]
    gate_norms: NDArray[np.float32]
    weights: PregateWeights
    facts: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds."""
        arrays = {name: getattr(self.weights, name) for name in PARTS} | {GATES: self.gate_norms}
        return {name: torch.from_numpy(array).contiguous() for name, array in arrays.items()}

    def metadata(self) -> dict[str, str]:
        """One entry: the order of several is not the same in every run."""
        about = {
            "version": VERSION,
            "config_sha256": self.config_sha256,
            **asdict(self.shape),
            "layers": list(self.layers),
            "facts": dict(self.facts),
        }
        return {ABOUT: json.dumps(about)}


def gate_norms(gates: Sequence[LayerGate]) -> NDArray[np.float32]:
    """[L, E]"""
    norms: NDArray[np.float32] = torch.stack([g.weight.float().norm(dim=1) for g in gates]).numpy()
    return norms


def load_pregate(path: Path, config_sha256: str, gates: Sequence[LayerGate]) -> TrainedPregate:
    """gates: of all MoE layers of the model, in rising order.

    Raises ConfigError naming the file where it is missing, broken, of another version, or was
    trained for another model.
    """
    if not path.is_file():
        raise ConfigError(
            f"predictor: pregate was not trained for this model: there is no {path}",
            field="predictor",
            hint="convert with --pregate, or choose markov or gate_lookahead",
        )
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata.get(ABOUT, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise _refuse(path, f"cannot be read: {error}") from error
    if not isinstance(about, dict):
        raise _refuse(path, "is no pregate")
    if about.get("version") != VERSION:
        raise _refuse(path, f"has version {about.get('version')!r}, this moeserve reads {VERSION}")
    if about.get("config_sha256") != config_sha256:
        raise _refuse(path, "was trained for another model (config.json differs)")
    layers = tuple(gate.layer for gate in gates)
    if about.get("layers") != list(layers):
        raise _refuse(path, f"is for layers {about.get('layers')}, the model has {list(layers)}")
    try:
        shape = PregateShape(*(int(about[name]) for name in ("window", "rank", "heads", "units")))
    except (KeyError, TypeError, ValueError) as error:
        raise _refuse(path, f"is broken: {error!r}") from error
    _check(path, arrays, shape, gates)
    weights = PregateWeights(**{name: arrays[name] for name in PARTS})
    facts = about.get("facts", {})
    return TrainedPregate(config_sha256, shape, layers, arrays[GATES], weights, facts)


def part_shapes(shape: PregateShape, num_tokens: int, num_outputs: int) -> dict[str, Any]:
    """The shape of every part."""
    return {
        "own": (num_tokens, 2 * shape.rank),
        "context": (num_tokens, 2 * shape.rank),
        "place": (shape.heads, shape.window),
        "hidden_in": (shape.rank, shape.units),
        "hidden_bias": (shape.units,),
        "hidden_out": (shape.units, num_outputs),
        "direct": (shape.rank, num_outputs),
        "bias": (num_outputs,),
    }


def _check(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    shape: PregateShape,
    gates: Sequence[LayerGate],
) -> None:
    expected = gate_norms(gates)
    num_tokens = len(arrays["own"]) if "own" in arrays else 0
    shapes = part_shapes(shape, num_tokens, expected.size) | {GATES: expected.shape}
    for name, size in shapes.items():
        kind = np.float16 if name in ("own", "context") else np.float32
        found = arrays.get(name)
        if found is None or found.shape != size or found.dtype != kind:
            raise _refuse(path, f"is broken: {name} is not {np.dtype(kind)} {list(size)}")
        if not np.isfinite(found).all():
            raise _refuse(path, f"is broken: {name} is not finite")
    away = np.abs(arrays[GATES] - expected).max() / max(float(expected.mean()), 1e-30)
    if away > MOST_DIFFERENCE:
        raise _refuse(path, f"was trained for another model (its gates differ by {away:.0%})")


def _refuse(path: Path, why: str) -> ConfigError:
    hint = "convert again with --pregate, or choose markov or gate_lookahead"
    return ConfigError(f"predictor: {path} {why}", field="predictor_file", hint=hint)
