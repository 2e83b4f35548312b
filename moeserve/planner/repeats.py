"""Measuring until the spread is known, also where other work comes and goes.

What else runs comes in bursts, and on a machine that others share it never ends. An engine will
meet as much of it as calibration does, so a figure is the middle of its samples; a limit, which
nothing is to exceed, is a quartile; a rate of a disk, which is slow at times by itself, is that of
all of them together. Figures of one kind take turns: a burst meets some samples of all of them and
not all samples of one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeserve.core import ErrorCode, MoeserveError
from moeserve.experts.schedule.profile import Figure

#: which part of the samples is below a limit: what else runs makes rates smaller
LIMIT = 0.75
#: deviations of a normal distribution that hold 95 % of it
CONFIDENCE_95 = 1.96
#: times as many samples are taken of a difference that has not shown yet
PATIENCE = 8
#: samples of a turn, at most
MOST_TOGETHER = 16
Sample = Callable[[], float]


@dataclass(frozen=True)
class Measurement:
    """samples: each measures once; taken one after the other, again and again. figure: of the
    columns of what they gave. of_turn: of what one of them gave in a turn."""

    samples: tuple[Sample, ...]
    figure: Callable[[Sequence[list[float]]], Figure]
    of_turn: Callable[[Sequence[float]], float] = statistics.median


def usual(sample: Sample) -> Measurement:
    """What there is in the middle, times and rates alike."""
    return Measurement((sample,), lambda columns: summarise(columns[0]))


def limit(sample: Sample) -> Measurement:
    """A rate that nothing is to exceed."""
    return Measurement((sample,), lambda columns: summarise(columns[0], LIMIT))


def lasting(sample: Sample) -> Measurement:
    """A rate over all samples together, of equal amounts: where what varies is the thing's own, who
    waits for it waits for the slow samples most."""
    return Measurement(
        (sample,), lambda columns: over_all(columns[0]), of_turn=statistics.harmonic_mean
    )


def differing(more: Sample, less: Sample, count: int) -> Measurement:
    """(more - less) / count. Both are taken one right after the other, so that a machine which
    becomes slower does so for both."""
    return Measurement((more, less), lambda columns: _difference(columns[0], columns[1], count))


@dataclass(frozen=True)
class Repeats:
    """How long figures are measured: at_least samples of each, then on until it is known to within
    `known_to` (a share of it, 95 % confidence), or limit_s have passed for each, or at_most
    samples. A sample of what takes less than turn_s is put together from several."""

    at_least: int = 5
    at_most: int = 25
    known_to: float = 0.03
    limit_s: float = 0.5
    turn_s: float = 0.0

    def figure(self, sample: Sample) -> Figure:
        """A time by itself."""
        return self.measure([usual(sample)])[0]

    def difference(self, more: Sample, less: Sample, count: int) -> Figure:
        """A difference by itself."""
        return self.measure([differing(more, less, count)])[0]

    def measure(self, wanted: Sequence[Measurement]) -> list[Figure]:
        """Figures that take turns, so that a burst of other work meets some samples of all.

        What the first turn gives is dropped: caches and threads are cold then, and a virtual
        machine's memory may be, which are costs of their own and not this one. Raises
        MoeserveError where nothing can be made out.
        """
        jobs = [_Job(each) for each in wanted]
        for job in jobs:
            job.samples(self.turn_s)
        ends_s = time.perf_counter() + self.limit_s * len(jobs)
        waiting = list(jobs)
        while waiting:
            for job in waiting:
                job.take(self.turn_s)
            over = time.perf_counter() > ends_s
            waiting = [job for job in waiting if not self._is_done(job, over)]
        return [_positive(job.figure) for job in jobs]

    def _is_done(self, job: _Job, over: bool) -> bool:
        if job.count < self.at_least:
            return False
        job.judge()
        if job.figure.value <= 0:  # a difference within the noise: so far nothing is known of it
            return job.count >= PATIENCE * self.at_most
        return job.figure.interval <= self.known_to or over or job.count >= self.at_most


class _Job:
    """A measurement under way."""

    def __init__(self, wanted: Measurement) -> None:
        self._wanted = wanted
        self._columns: list[list[float]] = [[] for _ in wanted.samples]
        self.figure = Figure(value=0.0)

    @property
    def count(self) -> int:
        return len(self._columns[0])

    def samples(self, turn_s: float) -> list[list[float]]:
        """Of one turn."""
        ends_s = time.perf_counter() + turn_s
        found = [[sample() for sample in self._wanted.samples]]
        while time.perf_counter() < ends_s and len(found) < MOST_TOGETHER:
            found.append([sample() for sample in self._wanted.samples])
        return found

    def take(self, turn_s: float) -> None:
        found = self.samples(turn_s)
        for column, values in zip(self._columns, zip(*found, strict=True), strict=True):
            column.append(self._wanted.of_turn(values))

    def judge(self) -> None:
        self.figure = self._wanted.figure(self._columns)


def summarise(samples: Sequence[float], share: float = 0.5) -> Figure:
    """A quantile, the distance of the quartiles as a share of it, and the half of its 95 %
    confidence interval likewise.

    The interval is that of order statistics, which needs no distribution: of n samples, the rank of
    a quantile q strays by sqrt(n q (1 - q)) (David and Nagaraja, Order Statistics, section 7.1).
    """
    ordered = sorted(samples)
    count = len(ordered)
    value = _quantile(ordered, share)
    if value <= 0:
        return Figure(value=0.0)
    stray = CONFIDENCE_95 * math.sqrt(count * share * (1 - share))
    low = max(0, math.floor(count * share - stray))
    high = min(count - 1, math.ceil(count * share + stray))
    interval = (ordered[high] - ordered[low]) / 2 / value
    return Figure(value=value, spread=_quartiles(samples) / value, interval=interval)


def over_all(rates: Sequence[float]) -> Figure:
    """The rate of equal amounts together. Its interval is that of the mean of their times: as a
    share it is the same for the rate."""
    value = statistics.harmonic_mean(rates)
    times = [value / rate for rate in rates]  # as shares of their mean
    stray = statistics.stdev(times) / math.sqrt(len(times)) if len(times) > 1 else 1.0
    return Figure(value=value, spread=_quartiles(rates) / value, interval=CONFIDENCE_95 * stray)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Between two samples in proportion."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _difference(more: list[float], less: list[float], count: int) -> Figure:
    of_all = summarise([a - b for a, b in zip(more, less, strict=True)])
    return Figure(value=of_all.value / count, spread=of_all.spread, interval=of_all.interval)


def _quartiles(samples: Sequence[float]) -> float:
    if len(samples) < 2:
        return 0.0
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
