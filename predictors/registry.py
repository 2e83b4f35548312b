"""Predictors by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from moeserve.core import ConfigError
from moeserve.predictors.base import Predictor
from moeserve.predictors.frequency import FrequencyPredictor
from moeserve.predictors.gate_lookahead import GateLookahead
from moeserve.predictors.gates import LayerGate, MakeProduct, plain_product
from moeserve.predictors.markov import MarkovPredictor
from moeserve.predictors.none import NonePredictor

PREDICTORS = ("none", "frequency", "markov", "gate_lookahead")


def make_predictor(
    name: str,
    num_experts: Mapping[int, int],
    depth: int,
    gates: Sequence[LayerGate] = (),
    make_product: MakeProduct = plain_product,
) -> Predictor:
    """num_experts: experts per MoE layer, by the layer's index. depth: layers to look ahead.
    gates: of all MoE layers, for predictors that need them.

    Raises ConfigError for a name that is none, ModelError for a model that it cannot serve.
    """
    if name == "none" or not num_experts:
        return NonePredictor()
    if name == "frequency":
        return FrequencyPredictor(num_experts, depth)
    if name == "markov":
        return MarkovPredictor(num_experts, depth)
    if name == "gate_lookahead":
        return GateLookahead(gates, depth, make_product)
    close = difflib.get_close_matches(name, PREDICTORS, n=1)
    raise ConfigError(
        f"predictor: {name!r} is not one of {', '.join(PREDICTORS)}",
        field="predictor",
        hint=f"did you mean {close[0]}?" if close else None,
    )
