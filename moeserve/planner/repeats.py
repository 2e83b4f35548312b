"""Measuring until the spread is known."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeserve.core import ErrorCode, MoeserveError
from moeserve.experts.schedule.profile import Figure


@dataclass(frozen=True)
class Repeats:
    """How long one figure is measured: at_least samples, then on until the median is known to
    within `known_to` (a share of it), or limit_s have passed, or there are at_most samples."""

    at_least: int = 5
    at_most: int = 25
    known_to: float = 0.02
    limit_s: float = 0.5

    def figure(self, sample: Callable[[], float]) -> Figure:
        """sample: measures once. What it gives the first time is dropped: caches and threads are
        cold then, which is a cost of its own and not this one."""
        return self._until_known(lambda: (sample(),), lambda samples: summarise(samples[0]))

    def difference(
        self, more: Callable[[], float], less: Callable[[], float], count: int
    ) -> Figure:
        """(more - less) / count, of the shortest of each: what else runs only makes times longer,
        and a difference takes the noise of both."""
        return self._until_known(
            lambda: (more(), less()), lambda samples: _difference(samples[0], samples[1], count)
        )

    def _until_known(
        self,
        sample: Callable[[], tuple[float, ...]],
        judge: Callable[[Sequence[list[float]]], Figure],
    ) -> Figure:
        columns: list[list[float]] = [[] for _ in sample()]
        ends_s = time.perf_counter() + self.limit_s
        while True:
            for column, value in zip(columns, sample(), strict=True):
                column.append(value)
            count = len(columns[0])
            if count < self.at_least:
                continue
            figure = judge(columns)
            # The median of n samples strays by about the distance of the quartiles over sqrt(n)
            # (0.93 of it, for a normal distribution).
            known = figure.value > 0 and figure.spread / count**0.5 <= self.known_to
            over = time.perf_counter() > ends_s and figure.value > 0
            if known or over or count >= self.at_most:
                return _positive(figure)


def summarise(samples: list[float]) -> Figure:
    """The median, and the distance of the quartiles as a share of it.

    Median and quartiles, not mean and deviation: what else runs makes single samples many times
    longer, which says nothing of the figure.
    """
    median = statistics.median(samples)
    return Figure(value=max(median, 0.0), spread=_quartiles(samples) / median if median > 0 else 0)


def _difference(more: list[float], less: list[float], count: int) -> Figure:
    difference = min(more) - min(less)
    if difference <= 0:
        return Figure(value=0.0)
    spread = (_quartiles(more) ** 2 + _quartiles(less) ** 2) ** 0.5 / difference
    return Figure(value=difference / count, spread=spread)


def _quartiles(samples: list[float]) -> float:
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first


def _positive(figure: Figure) -> Figure:
    """Raises MoeserveError for what cannot be a rate or a time, as a difference may come out."""
    if figure.value > 0:
        return figure
    raise MoeserveError(
        "a measurement came out as nothing: something else takes more time here than what is"
        " measured",
        code=ErrorCode.UNAVAILABLE,
        hint="measure when nothing else runs",
    )
