"""Costs over a count, between the points that were measured."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


class Curve(dict[int, float]):
    """A cost in microseconds over a count: exact at the measured points, straight between them.

    `curve[count]`. Below the first point the first cost holds, beyond the last the last slope goes
    on; a single point is a constant. Costs that were asked for are kept, since the scheduler asks
    for the same few in every layer of every step.
    """

    def __init__(self, counts: Sequence[int], us: Sequence[float]) -> None:
        """counts: ascending."""
        super().__init__(zip(counts, us, strict=True))
        self.counts = tuple(counts)
        self._us = tuple(us)

    def __missing__(self, count: int) -> float:
        counts, us = self.counts, self._us
        after = bisect_right(counts, count)
        if after == 0 or len(counts) == 1:
            cost = us[0]
        else:
            left = min(after, len(counts) - 1) - 1
            slope = (us[left + 1] - us[left]) / (counts[left + 1] - counts[left])
            cost = us[left] + slope * (count - counts[left])
        self[count] = cost
        return cost
