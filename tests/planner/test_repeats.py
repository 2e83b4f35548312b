"""Figures from samples that other work disturbs."""

from __future__ import annotations

import math
import random

import pytest

from moeserve.core import MoeserveError
from moeserve.planner.repeats import (
    MOST_TOGETHER,
    Repeats,
    differing,
    lasting,
    limit,
    over_all,
    summarise,
    usual,
)

SHORT = Repeats(at_least=3, at_most=3, limit_s=0.01)


def test_repeats_stop_when_the_figure_is_known_or_the_samples_end() -> None:
    calls = iter([100.0, *[1.0] * 100])
    steady = Repeats(at_least=4, at_most=50, limit_s=60.0).figure(lambda: next(calls))
    assert (steady.value, steady.spread, steady.interval) == (1.0, 0.0, 0.0)
    assert next(calls, None) == 1.0
    assert len(list(calls)) == 100 - 4 - 1
    growing = iter([0.0, *map(float, range(1, 21))])
    figure = Repeats(at_least=2, at_most=20, limit_s=60.0).figure(lambda: next(growing))
    assert figure.value == pytest.approx(1.0 + 0.5 * 19)
    assert not list(growing)
    with pytest.raises(MoeserveError, match="measure when nothing else runs"):
        SHORT.figure(lambda: -1.0)


def test_a_burst_of_other_work_changes_no_figure() -> None:
    """Times ten times as long for a third of the samples."""
    rng = random.Random(seed := random.randrange(1 << 30))
    phase = rng.randrange(3)
    disturbed = [number % 3 == phase for number in range(400)]
    clock = iter(disturbed)

    def sample() -> float:
        return rng.uniform(1.0, 1.01) * (10.0 if next(clock) else 1.0)

    repeats = Repeats(at_least=20, at_most=30, limit_s=60.0)
    for figure in repeats.measure([usual(sample)] * 4):
        assert figure.value < 1.02, f"seed {seed}"
    clock = iter(disturbed)
    assert repeats.measure([limit(lambda: 1 / sample())])[0].value > 0.98, f"seed {seed}"


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_interval_holds_the_quantile_of_the_distribution(share: float) -> None:
    rng = random.Random(seed := random.randrange(1 << 30))
    inside = 0
    for _ in range(400):
        samples = [rng.expovariate(1.0) for _ in range(25)]
        figure = summarise(samples, share)
        quantile = -math.log(1 - share)
        inside += abs(figure.value - quantile) <= 2 * figure.interval * figure.value
    assert inside >= 0.9 * 400, f"seed {seed}"


def test_a_turn_has_as_many_samples_as_there_is_time_for() -> None:
    calls: list[int] = []
    patient = Repeats(at_least=2, at_most=2, limit_s=60.0, turn_s=1000.0)
    figure = patient.figure(lambda: float(calls.append(0) or len(calls) % 2 + 1))
    assert len(calls) == 3 * MOST_TOGETHER, "the first turn is dropped"
    assert (figure.value, figure.spread) == (1.5, 0.0)


def test_figures_take_turns() -> None:
    order: list[int] = []
    samples = [lambda i=i: float(order.append(i) or i + 1) for i in range(3)]
    Repeats(at_least=3, at_most=3, limit_s=60.0).measure([usual(sample) for sample in samples])
    assert order == [0, 1, 2] * 4


def test_a_difference_is_of_samples_that_follow_each_other() -> None:
    more, less = iter([0.0, 30.0, 132.0, 900.0]), iter([0.0, 10.0, 110.0, 10.0])
    figure = SHORT.difference(lambda: next(more), lambda: next(less), 2)
    assert figure.value == (132.0 - 110.0) / 2
    assert figure.spread == pytest.approx(((22 + 890) / 2 - (20 + 22) / 2) / 22)
    with pytest.raises(MoeserveError, match="came out as nothing"):
        SHORT.difference(lambda: 1.0, lambda: 2.0, 1)


def test_a_machine_that_becomes_slower_changes_no_difference() -> None:
    rng = random.Random(seed := random.randrange(1 << 30))
    pace = [1.0]

    def takes(work: float) -> float:
        pace[0] *= 1.002
        return work * pace[0] * rng.uniform(1.0, 1.01)

    repeats = Repeats(at_least=20, at_most=20, limit_s=60.0)
    figure = repeats.measure([differing(lambda: takes(9.0), lambda: takes(8.0), 1)])[0]
    assert figure.value == pytest.approx(1.0, abs=0.15), f"seed {seed}"


def test_a_rate_that_lasts_is_that_of_all_amounts_in_all_the_time() -> None:
    """Against the sum of amounts over the sum of times, and the interval against resampling."""
    rng = random.Random(seed := random.randrange(1 << 30))
    rates = [rng.choice([1.0, 1.0, 1.0, 0.2]) * rng.uniform(9.0, 10.0) for _ in range(60)]
    figure = Repeats(at_least=60, at_most=60, limit_s=60.0).measure(
        [lasting(iter([5.0, *rates]).__next__)]
    )[0]
    assert figure.value == pytest.approx(60 * 7.0 / sum(7.0 / rate for rate in rates))
    assert figure.value < 0.95 * summarise(rates).value, f"seed {seed}"
    again = sorted(over_all(rng.choices(rates, k=60)).value for _ in range(2000))
    half = (again[1949] - again[50]) / 2 / figure.value
    assert figure.interval == pytest.approx(half, rel=0.3), f"seed {seed}"
    assert over_all([3.0]).interval >= 1, "of one sample nothing is known"
    in_one_turn = Repeats(at_least=1, at_most=1, limit_s=60.0, turn_s=1000.0)
    some = iter([*[5.0] * MOST_TOGETHER, *rates[:MOST_TOGETHER]])
    together = in_one_turn.measure([lasting(some.__next__)])[0]
    assert together.value == pytest.approx(over_all(rates[:MOST_TOGETHER]).value)
