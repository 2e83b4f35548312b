"""HybriMoE's Minus Recent Score (arXiv:2504.05897, section on cache management)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.cache.policies.base import RankedPolicy
from moeserve.core import LayerUse

#: of 0.4, 0.15, 0.05 the best on the part of both routing traces that policies were tuned on
ALPHA = 0.05


class MrsPolicy(RankedPolicy):
    """S <- alpha * TopP(s) + (1 - alpha) * S, with s the router's scores; the least S goes first.

    The paper keeps the p = 2K largest scores. A step tells the scores of the chosen experts, K per
    row, over all rows of the batch, so TopP is what was chosen; scores are scaled to a sum of one.
    """

    name = "mrs"

    def __init__(self, numbers: ExpertNumbers, alpha: float = ALPHA) -> None:
        super().__init__(numbers)
        self._alpha = alpha
        self._score = np.zeros(numbers.total, np.float64)

    def observed(self, use: LayerUse) -> None:
        score = self._score[self.numbers.span_of[use.layer]]
        score *= 1 - self._alpha
        total = float(use.weights.sum())
        if total > 0:
            score += use.weights * (self._alpha / total)

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Everything was said by `observed`."""

    def worth(self, numbers: Numbers) -> NDArray[np.float64]:
        return self._score[numbers]
