"""Placements against the exhaustive optimum, on a simulation written independently here."""

from __future__ import annotations

import statistics
from itertools import permutations

import numpy as np
import pytest
from support.layer_schedules import random_costs, random_rows, residency_of, use_of
from support.randomness import fresh_seed

from moeserve.cache.expert_cache import Residency, Tier
from moeserve.core import ConfigError, Placement
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.curve import Curve
from moeserve.experts.schedule.intra_layer import FetchOrder, TimelinePlacement
from moeserve.experts.schedule.timeline import fill, makespan_us


def simulated_us(
    costs: CostModel, rows: np.ndarray, placement: Placement, tier: Tier = Tier.DEVICE
) -> float:
    """Length of the layer, transfer by transfer. On the host tier all compute is the CPU's."""
    computes = costs.device if tier is Tier.DEVICE else costs.cpu
    fetches = costs.link if tier is Tier.DEVICE else costs.disk
    assert computes is not None
    assert fetches is not None
    start_us = costs.device_start_us if tier is Tier.DEVICE else costs.cpu_start_us
    local = placement.on_device if tier is Tier.DEVICE else placement.on_cpu
    shared_us = costs.shared_us if tier is Tier.DEVICE else 0.0
    now_us = shared_us + sum(computes[int(rows[e])] for e in local)
    now_us += start_us if shared_us or local or placement.fetch_first else 0.0
    for position, e in enumerate(placement.fetch_first, start=1):
        now_us = max(now_us, position * fetches[costs.expert_bytes]) + computes[int(rows[e])]
    if tier is Tier.HOST or not placement.on_cpu:
        return now_us
    return max(now_us, costs.cpu_start_us + sum(costs.cpu[int(rows[e])] for e in placement.on_cpu))


def optimum_us(costs: CostModel, rows: np.ndarray, residency: Residency) -> float:
    """Every assignment of every active expert, with every order of transfers."""
    active = np.flatnonzero(rows).tolist()
    best = float("inf")
    for mask in range(1 << len(active)):
        on_cpu = tuple(e for i, e in enumerate(active) if mask >> i & 1)
        kept = [e for i, e in enumerate(active) if not mask >> i & 1]
        on_device = tuple(e for e in kept if e in residency.ready)
        for order in permutations(e for e in kept if e not in residency.ready):
            placement = Placement(0, on_device, order, on_cpu)
            best = min(best, simulated_us(costs, rows, placement))
    return best


def test_placement_is_near_the_exhaustive_optimum() -> None:
    rng = np.random.default_rng(fresh_seed())
    shares = []
    for _ in range(150):
        costs = random_costs(rng)
        residency = residency_of(rng, 16, Tier.DEVICE)
        rows = random_rows(rng, int(rng.integers(1, 7)), 16)
        placement = TimelinePlacement({0: costs}).place(use_of(rows), residency)
        shares.append(optimum_us(costs, rows, residency) / simulated_us(costs, rows, placement))
    assert max(shares) <= 1 + 1e-9
    assert statistics.fmean(shares) >= 0.99
    assert min(shares) >= 0.9


def test_equal_rows_are_placed_optimally() -> None:
    """One token: nothing distinguishes experts but where they stand."""
    rng = np.random.default_rng(fresh_seed())
    for _ in range(30):
        costs = random_costs(rng)
        residency = residency_of(rng, 12, Tier.DEVICE)
        rows = np.minimum(random_rows(rng, 6, 12), 1)
        placement = TimelinePlacement({0: costs}).place(use_of(rows), residency)
        best_us = optimum_us(costs, rows, residency)
        assert simulated_us(costs, rows, placement) == pytest.approx(best_us)


def greedy_us(costs: CostModel, rows: np.ndarray, residency: Residency) -> float:
    """Earliest free first, as HybriMoE describes it: the device takes the resident (or arrived)
    expert with most rows, the link the absent one with most, the CPU the one with least."""
    assert costs.device is not None
    falling = sorted(np.flatnonzero(rows).tolist(), key=lambda e: -rows[e])
    resident = [e for e in falling if e in residency.ready]
    absent = [e for e in falling if e not in residency.ready]
    cpu_us, link_us, device_us = costs.cpu_start_us, 0.0, costs.device_start_us + costs.shared_us
    fetch_us = costs.transfer_us(costs.expert_bytes)
    on_cpu: list[int] = []
    on_device: list[int] = []
    fetched: list[int] = []
    while resident or absent:
        # Whoever would be done first with its next expert takes it.
        choices = []
        if resident:
            choices.append((device_us + costs.device[int(rows[resident[0]])], "device"))
        if absent:
            arrived_us = link_us + fetch_us
            ends_us = max(device_us, arrived_us) + costs.device[int(rows[absent[0]])]
            choices.append((ends_us, "link"))
        smallest = absent or resident
        choices.append((cpu_us + costs.cpu[int(rows[smallest[-1]])], "cpu"))
        ends_us, who = min(choices)
        if who == "cpu":
            on_cpu.append(smallest.pop())
            cpu_us = ends_us
        elif who == "device":
            on_device.append(resident.pop(0))
            device_us = ends_us
        else:
            fetched.append(absent.pop(0))
            link_us += fetch_us
            device_us = ends_us
    return simulated_us(costs, rows, Placement(0, tuple(on_device), tuple(fetched), tuple(on_cpu)))


def test_placement_is_never_longer_than_filling_earliest_free_first() -> None:
    rng = np.random.default_rng(fresh_seed())
    for _ in range(200):
        costs = random_costs(rng)
        residency = residency_of(rng, 128, Tier.DEVICE)
        rows = random_rows(rng, int(rng.integers(1, 129)), 128)
        placement = TimelinePlacement({0: costs}).place(use_of(rows), residency)
        ours_us = simulated_us(costs, rows, placement)
        assert ours_us <= greedy_us(costs, rows, residency) * (1 + 1e-9)


@pytest.mark.parametrize("scheduler", [TimelinePlacement, FetchOrder])
def test_every_active_expert_is_placed_once_and_runs_where_it_can(
    scheduler: type[TimelinePlacement] | type[FetchOrder],
) -> None:
    rng = np.random.default_rng(fresh_seed())
    tier = Tier.DEVICE if scheduler is TimelinePlacement else Tier.HOST
    for _ in range(100):
        residency = residency_of(rng, 32, tier)
        rows = random_rows(rng, int(rng.integers(0, 33)), 32)
        placement = scheduler({0: random_costs(rng)}).place(use_of(rows), residency)
        placed = placement.on_device + placement.fetch_first + placement.on_cpu
        assert sorted(placed) == np.flatnonzero(rows).tolist()
        assert residency.ready.issuperset(placement.on_device)
        assert residency.ready.isdisjoint(placement.fetch_first)
        if tier is Tier.HOST:
            assert residency.ready.issuperset(placement.on_cpu)


def test_reads_from_disk_are_ordered_optimally() -> None:
    rng = np.random.default_rng(fresh_seed())
    for _ in range(100):
        costs = random_costs(rng)
        residency = residency_of(rng, 8, Tier.HOST)
        rows = random_rows(rng, int(rng.integers(1, 7)), 8)
        scheduler = FetchOrder({0: costs})
        placement = scheduler.place(use_of(rows), residency)
        best_us = min(
            simulated_us(costs, rows, Placement(0, (), order, placement.on_cpu), Tier.HOST)
            for order in permutations(placement.fetch_first)
        )
        assert simulated_us(costs, rows, placement, Tier.HOST) == pytest.approx(best_us)


@pytest.mark.parametrize("scheduler", [TimelinePlacement, FetchOrder])
def test_layer_us_is_what_such_a_layer_takes(
    scheduler: type[TimelinePlacement] | type[FetchOrder],
) -> None:
    rng = np.random.default_rng(fresh_seed())
    tier = Tier.DEVICE if scheduler is TimelinePlacement else Tier.HOST
    for _ in range(50):
        costs = random_costs(rng)
        num_ready, num_absent, each = (int(n) for n in rng.integers(1, 9, 3))
        rows = np.full(num_ready + num_absent, each, np.int32)
        residency = Residency(0, tier, rows.size, frozenset(range(num_ready)))
        made = scheduler({0: costs})
        placement = made.place(use_of(rows), residency)
        assert made.rows_per_expert == each
        expected_us = simulated_us(costs, rows, placement, tier)
        assert made.layer_us(0, num_ready, num_absent, each) == pytest.approx(expected_us)


PLAIN = CostModel(
    expert_bytes=1,
    cpu=Curve([1], [100.0]),
    cpu_start_us=0.0,
    device=Curve([1], [10.0]),
    link=Curve([1], [90.0]),
)


def test_a_fetch_must_save_the_price_of_the_link() -> None:
    assert fill(PLAIN, [], [1, 1]) == (0, 1, 100.0)
    assert fill(PLAIN, [], [1, 1], link_price_us=99.0).num_fetched == 1
    assert fill(PLAIN, [], [1, 1], link_price_us=101.0) == (0, 0, 200.0)
    # As long either way: no bytes are moved for nothing.
    assert fill(PLAIN, [], [1]) == (0, 0, 100.0)


def test_what_is_on_its_way_is_waited_for_where_that_is_shorter() -> None:
    assert fill(PLAIN, [], [1], [20.0]) == (0, 1, 30.0)
    assert fill(PLAIN, [], [1], [95.0]).num_fetched == 0
    # It costs the link nothing more, whatever else the link could do.
    assert fill(PLAIN, [], [1], [20.0], link_price_us=1e6).num_fetched == 1
    coming = {3: 20.0, 5: 60.0}
    placement = TimelinePlacement({0: PLAIN}, lambda layer: coming).place(
        use_of(np.ones(6, np.int32)), Residency(0, Tier.DEVICE, 6, frozenset())
    )
    assert placement.fetch_first[:2] == (3, 5)
    assert makespan_us(PLAIN, [1], [], [1]) == 100.0


def test_a_profile_without_a_device_cannot_place_on_one() -> None:
    costs = CostModel(expert_bytes=1, cpu=Curve([1], [100.0]), cpu_start_us=0.0)
    with pytest.raises(ConfigError, match="says nothing of a device"):
        fill(costs, [1], [])
    with pytest.raises(ConfigError, match="says nothing of a disk"):
        costs.disk_us(1)
