"""Belady's optimum: an oracle for replays, which knows every use to come (L. Belady, 1966)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.cache.policies.base import RankedPolicy
from moeserve.core import LayerUse

NEVER = np.iinfo(np.int64).max // 2


class BeladyPolicy(RankedPolicy):
    """Whatever is used again last goes first.

    With slots of one size and the choice not to take an expert in, no policy misses less.
    """

    name = "belady"
    selective = True

    def __init__(self, numbers: ExpertNumbers, uses: Sequence[Numbers]) -> None:
        """uses: the experts of every use of a layer in the replay to come, in its order."""
        super().__init__(numbers)
        self._uses = uses
        self._next_uses = next_uses(numbers.total, uses)
        self._clock = 0
        self._next = np.full(numbers.total, NEVER)

    def observed(self, use: LayerUse) -> None:
        """AssertionError where the replay is not the one that was announced."""
        uses = self._uses[self._clock]
        wanted = np.flatnonzero(use.rows) + self.numbers.start_of[use.layer]
        assert np.array_equal(np.sort(uses), wanted), "another replay"
        self._next[uses] = self._next_uses[self._clock]
        self._clock += 1

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Everything was said by `observed`."""

    def worth(self, numbers: Numbers) -> NDArray[np.float64]:
        return -self._next[numbers].astype(np.float64)


def next_uses(num_experts: int, uses: Sequence[Numbers]) -> list[Numbers]:
    """For every use of a layer, when each of its experts is used next: an index of `uses`."""
    following = np.full(num_experts, NEVER)
    found: list[Numbers] = []
    for clock in range(len(uses) - 1, -1, -1):
        found.append(following[uses[clock]])
        following[uses[clock]] = clock
    return found[::-1]
