"""The predictor of a deployment, fed with the experts that simulated tokens choose."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from moeserve.config import ExpertConfig
from moeserve.core import Routing
from moeserve.planner.simulate.routing import SimulatedRouting
from moeserve.predictors.base import NOTHING, Prediction
from moeserve.predictors.registry import make_predictor


class Foresight:
    """Real predictions from simulated routing, by a predictor that looks at nothing else
    (`check_predictor`). What predicting itself takes is left out."""

    def __init__(
        self, config: ExpertConfig, routing: SimulatedRouting, sizes: Mapping[int, int]
    ) -> None:
        self._routing = routing
        self._rank = {layer: rank for rank, layer in enumerate(sizes)}
        self._predictor = make_predictor(config.predictor, sizes, config.layers_ahead)
        self._is_blind = config.predictor == "none"
        self._unused = torch.empty(0)

    def predict(self, layer: int, tokens: NDArray[np.int64]) -> Prediction:
        """After a layer has routed these tokens [T] of the routing."""
        if self._is_blind:
            return NOTHING
        rank = self._rank[layer]
        chosen = Routing(
            torch.from_numpy(self._routing.ids[tokens, rank].astype(np.int64)),
            torch.from_numpy(self._routing.weights[tokens, rank].astype(np.float32)),
        )
        return self._predictor.predict(layer, self._unused, chosen)
