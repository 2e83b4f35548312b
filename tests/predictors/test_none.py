"""The predictor that says nothing, and the prefetch that follows from nothing."""

from __future__ import annotations

import torch

from moeserve.core import Placement, Routing
from moeserve.experts.schedule.inter_layer import ResidentPrefetch
from moeserve.predictors.none import NonePredictor


def test_predicts_nothing_for_any_layer() -> None:
    routing = Routing(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    predictor = NonePredictor()
    prediction = predictor.predict(5, torch.zeros(3, 8), routing)
    assert predictor.name == "none"
    assert dict(prediction.probabilities) == {}
    ResidentPrefetch().prefetch(prediction, protect=Placement(5))
