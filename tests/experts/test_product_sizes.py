"""Costs between measured points and sizes: exact where a product is what it is said to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.randomness import fresh_seed

from moeserve.core import ExpertSpec
from moeserve.experts.schedule.curve import Curve
from moeserve.experts.schedule.product_sizes import Size, SizedCurve, curve_of_size

ROWS, SMALL_ROWS = (1, 4, 16, 64, 256), (1, 16, 256)
LARGE, SMALL = Size.of_matrix(2048, 2048), Size.of_matrix(512, 512)


def test_curve_is_exact_at_points_and_straight_between() -> None:
    rng = np.random.default_rng(fresh_seed())
    counts = np.unique(rng.integers(1, 500, 8))
    us = np.cumsum(rng.uniform(1, 50, counts.size))
    made = Curve(counts.tolist(), us.tolist())
    assert [made[int(count)] for count in counts] == us.tolist()
    for count in rng.integers(counts[0], counts[-1] + 1, 50):
        assert made[int(count)] == pytest.approx(np.interp(count, counts, us))
    slope = (us[-1] - us[-2]) / (counts[-1] - counts[-2])
    assert made[int(counts[-1]) + 100] == pytest.approx(us[-1] + 100 * slope)
    assert made[0] == us[0]


def sized(size: Size, rows: tuple[int, ...], us: list[float]) -> SizedCurve:
    return SizedCurve(size, Curve(rows, us))


@given(
    start=st.floats(0, 50),
    read_us=st.floats(1e-6, 1e-3),
    weight_us=st.floats(1e-7, 1e-4),
    number_us=st.floats(0, 1e-3),
    outputs=st.integers(1, 20000),
    inputs=st.integers(1, 20000),
    rows=st.sampled_from((*ROWS, 100, 1000)),
)
def test_two_sizes_tell_start_weights_and_numbers_apart(
    start: float,
    read_us: float,
    weight_us: float,
    number_us: float,
    outputs: int,
    inputs: int,
    rows: int,
) -> None:
    """Of one row numbers are left out, so that all it takes is a start and its weights."""

    def us(size: Size, num_rows: int) -> float:
        weights = (read_us + weight_us * (num_rows - 1)) * size.weights
        return start + weights + number_us * (num_rows - 1) * size.numbers

    measured = [
        sized(LARGE, ROWS, [us(LARGE, n) for n in ROWS]),
        sized(SMALL, SMALL_ROWS, [us(SMALL, n) for n in SMALL_ROWS]),
    ]
    wanted = Size.of_matrix(outputs, inputs)
    found = curve_of_size(wanted, measured)[rows]
    assert found == pytest.approx(us(wanted, rows), rel=1e-6, abs=1e-6 * us(LARGE, rows))


def test_a_size_measured_for_all_rows_comes_out_as_measured() -> None:
    rng = np.random.default_rng(fresh_seed())
    us = np.cumsum(rng.uniform(50, 100, len(ROWS))).tolist()
    expert = ExpertSpec(num_experts=8, hidden_size=1536, intermediate_size=512)
    own = sized(Size.of_expert(expert), ROWS, us)
    measured = [
        own,
        sized(LARGE, ROWS, [2 * value for value in us]),
        sized(SMALL, SMALL_ROWS, [own.us[n] / 4 for n in SMALL_ROWS]),
    ]
    found = curve_of_size(own.size, measured)
    assert [found[n] for n in ROWS] == pytest.approx(us)


def test_an_experts_numbers_are_those_of_its_two_products() -> None:
    expert = Size.of_expert(ExpertSpec(num_experts=2, hidden_size=96, intermediate_size=40))
    gate_up, down = Size.of_matrix(80, 96), Size.of_matrix(96, 40)
    assert expert.weights == gate_up.weights + down.weights
    assert expert.numbers == gate_up.numbers + down.numbers


@pytest.mark.parametrize("other", [None, Size.of_matrix(2048, 1536)])
def test_sizes_that_are_alike_give_proportions(other: Size | None) -> None:
    """What such two differ by is noise, which grows with the distance of what is asked for."""
    measured = [sized(LARGE, ROWS, [10.0, 20.0, 30.0, 40.0, 50.0])]
    if other is not None:
        measured.append(sized(other, ROWS, [9.0, 19.0, 29.0, 39.0, 49.0]))
    found = curve_of_size(SMALL, [measured[0]] if other is None else measured)
    near = measured[-1]
    share = SMALL.weights / near.size.weights
    assert [found[n] for n in ROWS] == pytest.approx([near.us[n] * share for n in ROWS])


def test_noise_makes_nothing_cheaper_than_nothing() -> None:
    """A small size that came out faster than its weights: numbers cost nothing then."""
    rng = np.random.default_rng(fresh_seed())
    for _ in range(100):
        large = sized(LARGE, ROWS, rng.uniform(1, 100, len(ROWS)).tolist())
        small = sized(SMALL, SMALL_ROWS, rng.uniform(1, 100, len(SMALL_ROWS)).tolist())
        wanted = Size.of_matrix(*rng.integers(1, 5000, 2).tolist())
        found = curve_of_size(wanted, [large, small])
        assert all(found[n] >= 0 for n in ROWS)
