"""Least frequently used, over the whole life of the process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.cache.policies.base import RankedPolicy


class LfuPolicy(RankedPolicy):
    """An expert is worth the number of steps that used it; ties by last use."""

    name = "lfu"

    def __init__(self, numbers: ExpertNumbers) -> None:
        super().__init__(numbers)
        self._clock = 0
        self._last = np.zeros(numbers.total, np.int64)
        self._count = np.zeros(numbers.total, np.int64)

    def used(self, layer: int, experts: Sequence[int]) -> None:
        self._clock += 1
        numbers = self.numbers.of(layer, experts)
        self._last[numbers] = self._clock
        self._count[numbers] += 1

    def worth(self, numbers: Numbers) -> NDArray[np.float64]:
        # the clock is below 2**53 for any life of a process, so the fraction stays below one use
        return self._count[numbers] + self._last[numbers] / (self._clock + 1.0)
