"""Least-Stale (SpecMD, arXiv:2602.03921): what the running pass has not used goes first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.cache.policies.base import RankedPolicy


class LeastStalePolicy(RankedPolicy):
    """Stale are experts whose last use was before the running pass through the layers.

    Stale ones go first, in the order in which they arrived; then the others in that order. A pass
    ends where the layer does not rise.
    """

    name = "least_stale"

    def __init__(self, numbers: ExpertNumbers) -> None:
        super().__init__(numbers)
        self._pass = 1
        self._layer = -1
        self._arrivals = 0
        self._last_pass = np.zeros(numbers.total, np.int64)
        self._arrival = np.zeros(numbers.total, np.int64)

    def used(self, layer: int, experts: Sequence[int]) -> None:
        if layer <= self._layer:
            self._pass += 1
        self._layer = layer
        self._last_pass[self.numbers.of(layer, experts)] = self._pass

    def loaded(self, number: int) -> None:
        self._arrivals += 1
        self._arrival[number] = self._arrivals

    def worth(self, numbers: Numbers) -> NDArray[np.float64]:
        fresh = self._last_pass[numbers] == self._pass
        worth: NDArray[np.float64] = self._arrival[numbers] + fresh * (self._arrivals + 1.0)
        return worth
