"""Least recently used: the simplest policy that follows a conversation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.cache.policies.base import RankedPolicy


class LruPolicy(RankedPolicy):
    """An expert is worth the time of its last use or arrival."""

    name = "lru"

    def __init__(self, numbers: ExpertNumbers) -> None:
        super().__init__(numbers)
        self._clock = 0
        self._last = np.zeros(numbers.total, np.int64)

    def used(self, layer: int, experts: Sequence[int]) -> None:
        self._clock += 1
        numbers = self.numbers.of(layer, experts)
        self._last[numbers] = self._clock

    def loaded(self, number: int) -> None:
        """A prefetched expert is as recent as one in use, or the next prefetch would take it."""
        self._last[number] = self._clock

    def worth(self, numbers: Numbers) -> NDArray[np.float64]:
        return self._last[numbers].astype(np.float64)
