"""What a layer over the disk takes beside reading and products: fitted to the layers that
calibration has seen (`tier_figures`).

As in `step_fit`, products are taken off by the curves that predictions use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

from moeserve.experts.schedule.profile import TierPoint
from moeserve.planner.least_squares import Costs, fit_costs

#: of a run's time that reads may take, at most: where they took all, it would not end
MOST_SLOWER = 0.9
#: of a layer, at least: to divide by
LEAST_US = 1.0


@dataclass(frozen=True)
class TierCosts:
    """Microseconds by feature; zeros where nothing is known.

    books: of a layer, of one that reads, of a record, of a run, of a row: counting uses, deciding,
    leasing, taking what has arrived. begin: of a layer that reads, of a record, of a row: between
    the order to read and the first run. to_read: of a layer that reads, of a record: to the first
    read. late_us: from a read's end to when its step goes on. runs: of a run of experts; in a layer
    that reads, of a number of a row that chose an expert; as a share, of the time beside reads.
    reads: as shares, of the time that reads take by themselves, of the time that is computed
    meanwhile: who reads needs a core, too, and computing takes it.
    """

    books: Costs = field(default_factory=lambda: np.zeros(5))
    begin: Costs = field(default_factory=lambda: np.zeros(3))
    to_read: Costs = field(default_factory=lambda: np.zeros(2))
    late_us: float = 0.0
    runs: Costs = field(default_factory=lambda: np.zeros(3))
    reads: Costs = field(default_factory=lambda: np.array((1.0, 0.0)))

    def books_us(self, num_rows: int, num_missing: int, num_runs: float) -> float:
        return float(self.books @ (1.0, float(num_missing > 0), num_missing, num_runs, num_rows))

    def begin_us(self, num_rows: int, num_missing: int) -> float:
        return float(self.begin @ (1.0, num_missing, num_rows)) if num_missing else 0.0

    def to_read_us(self, num_missing: int) -> float:
        return float(self.to_read @ (1.0, num_missing)) if num_missing else 0.0

    def reading_us(self, alone_us: float, computing_us: float) -> float:
        """Of reads that take so long by themselves, while computing takes so long."""
        reading_us = float(self.reads[0]) * alone_us
        return reading_us + float(self.reads[1]) * min(computing_us, reading_us)

    def run_us(self, products_us: float, numbers: float, reading_us: float) -> float:
        """Of one run whose products take so long by themselves. reading_us: for how long reads
        go on beside it, which slow it down."""
        return self.beside_us(
            products_us + float(self.runs[0] + self.runs[1] * numbers), reading_us
        )

    def beside_us(self, alone_us: float, reading_us: float) -> float:
        """Of any work that takes so long alone, while reads go on for so long beside it."""
        slower = min(float(self.runs[2]), MOST_SLOWER)
        return min(alone_us / (1 - slower), alone_us + slower * max(0.0, reading_us))


@dataclass(frozen=True)
class LayerProducts:
    """Of a layer of the model that was measured, by the curves alone. numbers: of a row that chose
    experts, once for each. experts_us: for rows and chosen experts. other_us: router and norms."""

    numbers: int
    start_us: float
    experts_us: Callable[[int, float], float]
    other_us: Callable[[int], float]


def fit_tier(points: Sequence[TierPoint], products: LayerProducts) -> TierCosts:
    """Where no step waited for a read, nothing is known of `late_us` alone; where nothing was read,
    of all. Older profiles do not say what reads take by themselves: nothing slows them then."""
    reading = [point for point in points if point.num_missing]
    stalled = [point for point in reading if "late" in point.us]
    if not reading:
        return TierCosts()
    compared = [point for point in reading if "alone" in point.us]
    late = _fit(stalled, lambda p: (1.0,), lambda p: _value(p, "late")) if stalled else (0.0,)
    return TierCosts(
        books=_fit(
            points,
            lambda p: (1.0, float(p.num_missing > 0), p.num_missing, p.num_groups, p.num_rows),
            lambda p: _value(p, "books") - products.other_us(p.num_rows),
        ),
        begin=_fit(
            reading, lambda p: (1.0, p.num_missing, p.num_rows), lambda p: _value(p, "begin")
        ),
        to_read=_fit(reading, lambda p: (1.0, p.num_missing), lambda p: _value(p, "to read")),
        late_us=float(late[0]),
        runs=_fit(
            points,
            lambda p: (
                p.num_groups,
                p.num_rows * products.numbers * float(p.num_missing > 0),
                _value(p, "beside"),
            ),
            lambda p: _runs_us(p, products),
        ),
        reads=_fit(
            compared,
            lambda p: (_value(p, "alone"), _value(p, "beside")),
            lambda p: _value(p, "reading"),
        )
        if compared
        else TierCosts().reads,
    )


def _fit(
    points: Sequence[TierPoint],
    features: Callable[[TierPoint], Sequence[float]],
    us: Callable[[TierPoint], float],
) -> Costs:
    """Errors count as a share of the whole layer, and as often as such a layer was seen. On a CPU
    that is imagined faster (`on_other_cpu`) nothing may be left of a layer that noise made short:
    then as a share of `LEAST_US`."""
    weights = [sqrt(point.num_layers) / max(_value(point, "layer"), LEAST_US) for point in points]
    return fit_costs(
        [features(point) for point in points], [us(point) for point in points], weights
    )


def _runs_us(point: TierPoint, products: LayerProducts) -> float:
    starts = max(1.0, point.num_groups - 1) * products.start_us
    return _value(point, "experts") - products.experts_us(point.num_rows, point.num_active) - starts


def _value(point: TierPoint, part: str) -> float:
    figure = point.us.get(part)
    return 0.0 if figure is None else figure.value
