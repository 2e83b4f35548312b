"""Ours: what a slot brings is expected reuse times the cost of a miss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.cache.policies.base import RankedPolicy
from moeserve.cache.policies.reuse_model import ReuseModel
from moeserve.core import LayerUse

#: keeps the uses to come finite
MOST_LOG_VALUE = -0.01


class ScorePolicy(RankedPolicy):
    """Worth of an expert: E[gamma^(time to its next use)] times the cost of a miss.

    Time is counted in passes through the layers. The estimate of `ReuseModel` is as old as the
    layer's last use; two things make it current: how much of a pass still lies before the layer
    (just after a layer has run, its experts are the furthest from use of all), and what a predictor
    says of the layer's next use. With a chance q to be wanted then, v = gamma * (q + (1 - q) * v').

    All experts of a model have the same size as a rule, and a miss costs the same for each; costs
    are given where that is not so.
    """

    name = "score"
    selective = True

    def __init__(
        self, numbers: ExpertNumbers, miss_costs: NDArray[np.float64] | None = None
    ) -> None:
        """miss_costs: [N] in any unit; only their ratios matter."""
        super().__init__(numbers)
        self._model = ReuseModel(numbers)
        self._log_cost = np.zeros(numbers.total) if miss_costs is None else np.log(miss_costs)
        self._log_worth = self._log_cost + self._model.log_value
        count = len(numbers.layers)
        steps = np.log(self._model.gamma) * np.arange(count) / count
        # [L, L] ln gamma * (share of a pass to go), by the layer that has run last
        self._ahead_from = np.stack([np.roll(steps, rank + 1) for rank in range(count)])
        self._ahead = np.zeros(count)
        # Predictions since a layer's last use, which nobody has asked the consequences of: a step
        # that misses nothing asks for no worth.
        self._predicted: dict[int, NDArray[np.float32]] = {}
        # Those that worths were made of: what is learnt later of an older use goes below them.
        self._taken: dict[int, NDArray[np.float32]] = {}

    def observed(self, use: LayerUse) -> None:
        self._predicted.pop(use.layer, None)
        self._taken.pop(use.layer, None)
        self._ahead = self._ahead_from[self.numbers.rank_of[use.layer]]
        self.put_off(partial(self._learn, use))

    def _learn(self, use: LayerUse) -> None:
        self._model.learn(use)
        span = self.numbers.span_of[use.layer]
        np.add(self._log_cost[span], self._model.log_value[span], out=self._log_worth[span])
        if use.layer in self._taken:
            self._predicted.setdefault(use.layer, self._taken.pop(use.layer))

    def expected(self, layer: int, probabilities: NDArray[np.float32]) -> None:
        self._predicted[layer] = probabilities

    def _take_predictions(self) -> None:
        """Of all layers at once: what numpy is called for costs more than what it computes."""
        if not self._predicted:
            return
        numbers = self.numbers.of_layers(self._predicted)
        chances = np.concatenate(list(self._predicted.values()))
        later = np.exp(self._model.log_value[numbers])
        value = self._model.gamma * (chances + (1 - chances) * later)
        self._log_worth[numbers] = self._log_cost[numbers] + np.log(value)
        self._taken.update(self._predicted)
        self._predicted.clear()

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Everything was said by `observed`."""

    def uses_to_come(self, numbers: Numbers) -> NDArray[np.float64]:
        """v / (1 - v): as if after every use the next one were as far off again as this one."""
        log_value = self._model.log_value[numbers] + self._ahead[self.numbers.rank[numbers]]
        value: NDArray[np.float64] = np.exp(np.minimum(log_value, MOST_LOG_VALUE))
        return value / (1 - value)

    def worth(self, numbers: Numbers) -> NDArray[np.float64]:
        self._take_predictions()
        worth: NDArray[np.float64] = (
            self._log_worth[numbers] + self._ahead[self.numbers.rank[numbers]]
        )
        return worth
