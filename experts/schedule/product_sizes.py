"""What a product of one size costs, from measured ones of other sizes.

A product of R rows takes a start, a time for each weight and one for each number that its rows
take in and give back: inputs are rounded, sums returned. Small matrices have more of these numbers
to a weight: in int8, 256 rows, 512 x 512 takes 1.5 times as much a weight as 2048 x 2048. Two sizes
of one format tell the three apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.core import ExpertSpec
from moeserve.experts.schedule.curve import Curve

#: weights of the largest measured size to those of the smallest: nearer, what they differ by is
#: the noise of measuring
APART = 2


@dataclass(frozen=True)
class Size:
    """Of a product, or of several behind each other. numbers: that one row takes in and gives
    back."""

    weights: int
    numbers: int

    @classmethod
    def of_matrix(cls, outputs: int, inputs: int) -> Size:
        return cls(outputs * inputs, outputs + inputs)

    @classmethod
    def of_expert(cls, spec: ExpertSpec) -> Size:
        return cls.of_expert_sizes(spec.hidden_size, spec.intermediate_size)

    @classmethod
    def of_expert_sizes(cls, hidden: int, inner: int) -> Size:
        """Gate and up together, then down."""
        return cls(3 * hidden * inner, (hidden + 2 * inner) + (inner + hidden))


@dataclass(frozen=True)
class SizedCurve:
    """Microseconds of a product of that size, by rows."""

    size: Size
    us: Curve


def curve_of_size(wanted: Size, measured: Sequence[SizedCurve]) -> Curve:
    """Microseconds of the wanted size by rows.

    measured: at least one. Where all are of about the same size, in proportion to the weights.
    Else a measured size comes out as it was measured, of those that were for the most rows; the
    others say at theirs what numbers cost.
    """
    most = max(len(each.us.counts) for each in measured)
    in_full = [each for each in measured if len(each.us.counts) == most]
    near = min(in_full, key=lambda each: _apart(each.size, wanted))
    small = min(measured, key=lambda each: each.size.weights)
    large = max(measured, key=lambda each: each.size.weights)
    start_us, number_us = 0.0, Curve([1], [0.0])
    if _apart(small.size, large.size) >= APART:
        start_us = _start_us(small, large)
        number_us = _number_us(small, large, start_us)

    def us(rows: int) -> float:
        numbers_us = max(0.0, number_us[rows])
        weights_us = max(0.0, near.us[rows] - start_us - numbers_us * near.size.numbers)
        share = wanted.weights / near.size.weights
        return start_us + weights_us * share + numbers_us * wanted.numbers

    return Curve(near.us.counts, [us(rows) for rows in near.us.counts])


def _start_us(small: SizedCurve, large: SizedCurve) -> float:
    """Of one row, which has few numbers: what is left beyond a time for each weight."""
    low, high = small.us[1], large.us[1]
    weights = large.size.weights - small.size.weights
    left = (low * large.size.weights - high * small.size.weights) / weights
    return min(max(0.0, left), low, high)


def _number_us(small: SizedCurve, large: SizedCurve, start_us: float) -> Curve:
    """By rows, where both were measured or lie between measured points."""
    counts = min(small.us.counts, large.us.counts, key=len)
    more = small.size.numbers / small.size.weights - large.size.numbers / large.size.weights
    found = []
    for rows in counts:
        low = (small.us[rows] - start_us) / small.size.weights
        high = (large.us[rows] - start_us) / large.size.weights
        found.append(max(0.0, low - high) / more)
    return Curve(counts, found)


def _apart(one: Size, other: Size) -> float:
    return max(one.weights / other.weights, other.weights / one.weights)
