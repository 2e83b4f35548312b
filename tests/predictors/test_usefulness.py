"""The depth of prefetching follows what prefetches turned out to be worth."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.core import ConfigError
from moeserve.predictors.usefulness import (
    FIRST_PAUSE_STEPS,
    LONGEST_PAUSE_STEPS,
    TRY_STEPS,
    PrefetchUsefulness,
    Returns,
    Switch,
)


def run(books: PrefetchUsefulness, steps: int, useful: dict[int, int]) -> list[tuple[int, ...]]:
    """Steps at layer 3 with 4 prefetches per distance, of which `useful[distance]` are used."""
    asked = []
    for _ in range(steps):
        distances = books.distances(3)
        books.check_integrity()
        for distance in distances:
            books.record(3, distance, useful[distance], 4 - useful[distance])
        asked.append(distances)
    return asked


def test_stays_on_while_it_pays() -> None:
    assert set(run(PrefetchUsefulness([3], 2, 0.5), 500, {1: 3, 2: 2})) == {(1, 2)}


def test_goes_off_where_it_does_not_pay_and_tries_again_less_and_less() -> None:
    asked = run(PrefetchUsefulness([3], 2, 0.5), 20_000, {1: 3, 2: 1})
    assert all(1 in distances for distances in asked)
    on = [step for step, distances in enumerate(asked) if 2 in distances]
    assert on[0] == 0
    starts = [b for a, b in zip([-9, *on], on, strict=False) if b > a + 1]
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert FIRST_PAUSE_STEPS <= gaps[0] <= FIRST_PAUSE_STEPS + 2 * TRY_STEPS
    assert all(later >= earlier for earlier, later in itertools.pairwise(gaps))
    assert gaps[-1] <= LONGEST_PAUSE_STEPS + TRY_STEPS
    assert len(on) < 20_000 / 100


def test_comes_back_when_it_pays_again() -> None:
    books = PrefetchUsefulness([3], 1, 0.5)
    run(books, 1000, {1: 0})
    asked = run(books, 3 * LONGEST_PAUSE_STEPS, {1: 4})
    assert set(asked[-1000:]) == {(1,)}
    assert books.useful_share(3, 1) == pytest.approx(1.0)


def test_layers_and_distances_are_apart() -> None:
    books = PrefetchUsefulness([3, 5], 2, 0.5)
    run(books, 50, {1: 0, 2: 4})
    assert books.distances(3) == (2,)
    assert books.distances(5) == (1, 2)
    assert books.useful_share(5, 1) is None


def test_an_idle_link_makes_everything_pay() -> None:
    books = PrefetchUsefulness([3], 1, 0.9)
    run(books, 50, {1: 1})
    assert books.distances(3) == ()
    books.break_even = 0.0
    assert set(run(books, 200, {1: 1})[-50:]) == {(1,)}


@pytest.mark.parametrize("break_even", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(break_even: float) -> None:
    with pytest.raises(ConfigError, match="break_even"):
        PrefetchUsefulness([0], 1, break_even)


def test_no_depth_prefetches_nothing() -> None:
    assert PrefetchUsefulness([0], 0, 0.5).distances(0) == ()
    with pytest.raises(ConfigError, match="depth"):
        PrefetchUsefulness([0], -1, 0.5)


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 4), st.floats(0, 1)),
        max_size=300,
    ),
    st.integers(1, 3),
)
def test_books_hold_for_any_outcomes(
    events: list[tuple[int, int, int, float]], max_depth: int
) -> None:
    """Also outcomes that come in late, and break-evens that move."""
    books = PrefetchUsefulness([0, 1], max_depth, 0.5)
    for layer, useful, wasted, break_even in events:
        books.break_even = break_even
        distances = books.distances(layer)
        assert set(distances) <= set(range(1, max_depth + 1))
        books.record(layer, 1 + useful % max_depth, useful, wasted)
        books.check_integrity()
        share = books.useful_share(layer, 1 + useful % max_depth)
        assert share is None or 0 <= share <= 1


def test_what_saves_less_than_it_takes_is_switched_off_and_tried_again() -> None:
    returns = Returns()
    switch = Switch(returns)
    asked = []
    for step in range(8000):
        saves_us = 20.0 if step < 1500 else 200.0
        for _ in range(6):  # layers
            asked.append(switch.allows(step, 1.0))
            if asked[-1]:
                returns.spend(100.0)
                returns.save(saves_us)
    assert all(asked[:500]), "too little was known to say no"
    assert not any(asked[1200:1300])
    assert sum(asked[1200 : 6 * 1500]) < 0.2 * (6 * 1500 - 1200)
    assert all(asked[-300:]), "a try has shown that it pays now"


def test_a_call_that_the_system_held_up_counts_little() -> None:
    returns = Returns()
    for number in range(400):
        returns.spend(20_000.0 if number % 40 == 39 else 50.0)
        returns.save(100.0)
    assert returns.pays(1.0)
