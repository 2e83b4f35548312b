"""Predictors by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from moeserve.core import ConfigError
from moeserve.predictors.base import Predictor
from moeserve.predictors.frequency import FrequencyPredictor
from moeserve.predictors.gate_lookahead import GateLookahead
from moeserve.predictors.gate_residual import GateResidual
from moeserve.predictors.gates import LayerGate
from moeserve.predictors.markov import MarkovPredictor
from moeserve.predictors.none import NonePredictor
from moeserve.predictors.pregate import PregatePredictor
from moeserve.predictors.pregate_file import PREGATE_FILE, load_pregate
from moeserve.predictors.residual_weights import (
    PREDICTORS_FILE,
    TrainedPredictor,
    load_trained,
)

PREDICTORS = ("none", "frequency", "markov", "gate_lookahead", "gate_residual", "pregate")
#: what those that are trained for a model are kept in, beside it
TRAINED_FILES: Mapping[str, str] = MappingProxyType(
    {"gate_residual": PREDICTORS_FILE, "pregate": PREGATE_FILE}
)


@dataclass(frozen=True)
class Implementations:
    """How predictors are made that can be computed in more than one way: from the experts per MoE
    layer, or all MoE layers' gates, and the depth."""

    markov: Callable[[Mapping[int, int], int], Predictor]
    lookahead: Callable[[Sequence[LayerGate], int], Predictor]
    residual: Callable[[TrainedPredictor, Sequence[LayerGate], int], Predictor]


#: by torch and numpy, wherever the model is
PLAIN = Implementations(MarkovPredictor, GateLookahead, GateResidual)


def make_predictor(
    name: str,
    num_experts: Mapping[int, int],
    depth: int,
    gates: Sequence[LayerGate] = (),
    trained: Path | None = None,
    config_sha256: str = "",
    implementations: Implementations = PLAIN,
) -> Predictor:
    """num_experts: experts per MoE layer, by the layer's index. depth: layers to look ahead.
    gates: of all MoE layers, for predictors that look at them or were trained on them. trained: the
    file of gate_residual or pregate, made for a model whose config.json has this sha256.

    Raises ConfigError for a name that is none and a file that is not for this model, ModelError for
    a model that the predictor cannot serve.
    """
    if name == "none" or not num_experts:
        return NonePredictor()
    if name == "frequency":
        return FrequencyPredictor(num_experts, depth)
    if name == "markov":
        return implementations.markov(num_experts, depth)
    if name == "gate_lookahead":
        return implementations.lookahead(gates, depth)
    if name == "gate_residual":
        if trained is None:
            raise ConfigError(
                "predictor: gate_residual has to be trained for the model",
                field="predictor_file",
                hint="make a file with `moeserve predictors train`, or choose gate_lookahead",
            )
        found = load_trained(trained, config_sha256, {gate.layer: gate for gate in gates})
        return implementations.residual(found, gates, depth)
    if name == "pregate":
        if trained is None:
            raise ConfigError(
                "predictor: pregate has to be trained for the model",
                field="predictor_file",
                hint="convert the model with --pregate, or choose gate_lookahead",
            )
        block = load_pregate(trained, config_sha256, gates)
        return PregatePredictor(block.weights, block.layers, depth)
    close = difflib.get_close_matches(name, PREDICTORS, n=1)
    raise ConfigError(
        f"predictor: {name!r} is not one of {', '.join(PREDICTORS)}",
        field="predictor",
        hint=f"did you mean {close[0]}?" if close else None,
    )
