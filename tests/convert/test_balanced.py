"""The balanced assignment against every assignment there is."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from moeserve.convert.balanced import balanced_assignment, balanced_kmeans

SEED = random.SystemRandom().randrange(10**6)


@pytest.mark.parametrize(("items", "clusters"), [(6, 3), (6, 2), (4, 2), (5, 5), (6, 1)])
@pytest.mark.parametrize("kind", ["floats", "ties", "one cluster is best for all"])
def test_no_assignment_costs_less(items: int, clusters: int, kind: str) -> None:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    for _ in range(5):
        cost = rng.normal(size=(items, clusters))
        if kind == "ties":
            cost = rng.integers(0, 3, size=(items, clusters)).astype(np.float64)
        if kind == "one cluster is best for all":
            cost[:, 0] -= 10
        found = balanced_assignment(cost)
        assert (np.bincount(found, minlength=clusters) == items // clusters).all()
        slots = np.repeat(np.arange(clusters), items // clusters)
        least = min(
            cost[list(order), slots].sum() for order in itertools.permutations(range(items))
        )
        assert cost[np.arange(items), found].sum() == pytest.approx(least, abs=1e-9)


def test_large_problems_agree_with_scipy() -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="the oracle for large problems")
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    cost = rng.normal(size=(240, 12)) + rng.normal(size=12) * 2
    found = balanced_assignment(cost)
    assert (np.bincount(found) == 20).all()
    rows, columns = optimize.linear_sum_assignment(np.repeat(cost, 20, axis=1))
    least = np.repeat(cost, 20, axis=1)[rows, columns].sum()
    assert cost[np.arange(240), found].sum() == pytest.approx(least, abs=1e-9)


def test_clusters_that_are_there_are_found() -> None:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    truth = rng.permutation(np.repeat(np.arange(4), 25))
    centres = 50 * np.eye(4, 7)
    points = centres[truth] + rng.normal(size=(100, 7))
    found = balanced_kmeans(points, 4, SEED)
    assert len(set(zip(truth, found, strict=True))) == 4


def test_equal_points_fill_every_cluster() -> None:
    found = balanced_kmeans(np.ones((12, 3)), 4, 0)
    assert (np.bincount(found) == 3).all()


def test_costs_that_are_not_finite_are_no_endless_search() -> None:
    cost = np.zeros((12, 3))
    cost[4, 1] = np.nan
    with pytest.raises(AssertionError, match="not finite"):
        balanced_assignment(cost)


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1.0, 1e150])
def test_costs_within_rounding_of_each_other(scale: float) -> None:
    """Moves whose gain is rounding alone: no cycle of them may look like a gain."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    for _ in range(20):
        cost = scale * (1 + 1e-16 * rng.integers(0, 4, size=(48, 6)) + rng.normal(size=(48, 1)))
        cost[:, 0] -= scale * rng.integers(0, 2)
        assert (np.bincount(balanced_assignment(cost), minlength=6) == 8).all()
