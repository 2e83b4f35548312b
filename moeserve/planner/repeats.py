"""Measuring until the spread is known."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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
        sample()
        ends_s = time.perf_counter() + self.limit_s
        samples: list[float] = []
        while len(samples) < self.at_most:
            samples.append(sample())
            if len(samples) < self.at_least:
                continue
            figure = summarise(samples)
            # The median of n samples strays by about the distance of the quartiles over sqrt(n)
            # (0.93 of it, for a normal distribution).
            if figure.spread / len(samples) ** 0.5 <= self.known_to:
                break
            if time.perf_counter() > ends_s:
                break
        return summarise(samples)


def summarise(samples: list[float]) -> Figure:
    """The median, and the distance of the quartiles as a share of it.

    Median and quartiles, not mean and deviation: what else runs makes single samples many times
    longer, which says nothing of the figure. Raises MoeserveError where the median is not positive,
    which a difference of two times can be.
    """
    median = statistics.median(samples)
    if not median > 0:
        raise MoeserveError(
            f"a measurement came out as {median:.3g}: something else takes more time here than what"
            " is measured",
            code=ErrorCode.UNAVAILABLE,
            hint="measure when nothing else runs",
        )
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return Figure(value=median, spread=(third - first) / median)
