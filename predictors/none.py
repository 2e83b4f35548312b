"""No prediction: for models whose experts are all resident, and the baseline of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeserve.core import Routing
from moeserve.predictors.base import NOTHING, Prediction, Predictor

if TYPE_CHECKING:
    from torch import Tensor


class NonePredictor(Predictor):
    """Says nothing about any layer."""

    name = "none"
    reads_rows = False

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        return NOTHING
