"""Placements over three tiers against the exhaustive optimum, on a simulation of its own."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise, permutations, product

import numpy as np
import pytest
from support.layer_schedules import random_costs, random_rows, residency_of, use_of
from support.randomness import fresh_seed

from moeserve.cache.expert_cache import Residency, Tier
from moeserve.core import Placement
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.disk_fill import Active, fill_from_disk
from moeserve.experts.schedule.intra_layer import TimelinePlacement
from moeserve.experts.schedule.over_disk import PlacementOverDisk, ReadsBelowDevice
from moeserve.experts.schedule.timeline import fill


def simulated_us(
    costs: CostModel,
    rows: np.ndarray,
    on_device: Sequence[int],
    fetched: Sequence[int],
    reads: Sequence[int],
    on_cpu: Sequence[int],
) -> float:
    """Length of the layer, event by event: every machine takes what is there, in its order."""
    assert costs.device is not None
    fetch_us, read_us = costs.transfer_us(costs.expert_bytes), costs.disk_us(costs.expert_bytes)
    there_us = {e: read_us * place for place, e in enumerate(reads, start=1)}
    link_us = 0.0
    device_us = costs.device_start_us + costs.shared_us
    device_us += sum(costs.device[int(rows[e])] for e in on_device)
    for e in fetched:
        link_us = max(link_us, there_us.get(e, 0.0)) + fetch_us
        device_us = max(device_us, link_us) + costs.device[int(rows[e])]
    if not on_device and not fetched and not costs.shared_us:
        device_us = 0.0
    cpu_us = 0.0
    for e in sorted(on_cpu, key=lambda e: there_us.get(e, 0.0)):
        cpu_us = max(cpu_us, there_us.get(e, 0.0)) + costs.cpu[int(rows[e])]
    return max(device_us, cpu_us + (costs.cpu_start_us if on_cpu else 0.0))


def placed_us(
    costs: CostModel, rows: np.ndarray, placement: Placement, in_host: frozenset[int]
) -> float:
    """What is on no tier is read in the order of the placement, as the supply does."""
    wanted = placement.fetch_first + placement.on_cpu
    reads = [e for e in wanted if e not in in_host]
    return simulated_us(
        costs, rows, placement.on_device, placement.fetch_first, reads, placement.on_cpu
    )


def optimum_us(
    costs: CostModel, rows: np.ndarray, on_device: frozenset[int], in_host: frozenset[int]
) -> float:
    """Every assignment of every active expert, with every order of copies and reads."""
    active = np.flatnonzero(rows).tolist()
    best = float("inf")
    for choice in product((False, True), repeat=len(active)):
        kept = {e for e, there in zip(active, choice, strict=True) if there}
        stays = kept & on_device
        for order in permutations([e for e in active if e not in stays]):
            fetched = [e for e in order if e in kept]
            reads = [e for e in order if e not in in_host]
            on_cpu = [e for e in order if e not in kept]
            best = min(best, simulated_us(costs, rows, list(stays), fetched, reads, on_cpu))
    return best


def scheduler(costs: CostModel, in_host: Residency) -> PlacementOverDisk:
    return PlacementOverDisk({0: costs}, lambda layer: in_host)


def test_with_all_in_host_it_is_the_placement_over_host_alone() -> None:
    """Price of the link and worth of what is kept included."""
    rng = np.random.default_rng(fresh_seed())
    num_changed = 0
    for _ in range(200):
        costs = random_costs(rng)
        on_device = residency_of(rng, 12, Tier.DEVICE)
        in_host = Residency(0, Tier.HOST, 12, frozenset(range(12)))
        use = use_of(random_rows(rng, int(rng.integers(2, 8)), 12))
        worth_us = rng.uniform(0, costs.cpu_us(1), 12)
        both = scheduler(costs, in_host), TimelinePlacement({0: costs})
        without = TimelinePlacement({0: costs})
        for each in (*both, without):
            each.link_price_us = float(costs.cpu_us(1))
        for each in both:
            each.kept_us = lambda layer, experts, worth_us=worth_us: worth_us[experts].tolist()
        over_disk, over_host = (each.place(use, on_device) for each in both)
        assert over_disk == over_host
        num_changed += over_host != without.place(use, on_device)
    assert num_changed > 20


def test_placement_is_near_the_exhaustive_optimum() -> None:
    rng = np.random.default_rng(fresh_seed())
    shares = []
    for _ in range(80):
        costs = random_costs(rng, link=(0.2, 4), disk=(0.5, 15))
        on_device, in_host = (residency_of(rng, 12, tier) for tier in (Tier.DEVICE, Tier.HOST))
        rows = random_rows(rng, int(rng.integers(1, 6)), 12)
        placement = scheduler(costs, in_host).place(use_of(rows), on_device)
        best_us = optimum_us(costs, rows, on_device.ready, in_host.ready)
        shares.append(best_us / placed_us(costs, rows, placement, in_host.ready))
    assert max(shares) <= 1 + 1e-9
    assert statistics.fmean(shares) >= 0.99
    assert sorted(shares)[3] >= 0.9, "three of 11533 were below, at 0.87 and more"


def test_makespan_is_that_of_the_simulation() -> None:
    """Whatever stands where; and where nothing is on disk, it is the fill of two tiers."""
    rng = np.random.default_rng(fresh_seed())
    for _ in range(300):
        costs = random_costs(rng, link=(0.2, 4), disk=(0.5, 15))
        kinds = [sorted(rng.integers(1, 60, rng.integers(0, 6)), reverse=True) for _ in range(4)]
        movable, staying, in_host, on_disk = ([int(n) for n in kind] for kind in kinds)
        loading_us = rng.uniform(0, costs.transfer_us(10**6), min(1, len(in_host))).tolist()
        price_us = float(rng.choice([0.0, 50.0]))
        m, k, x, us = fill_from_disk(
            costs, Active(movable, staying, in_host, on_disk), link_price_us=price_us
        )
        rows = np.array(staying + movable + in_host + on_disk, np.int32)
        first = np.cumsum([0, len(staying), len(movable), len(in_host), len(on_disk)]).tolist()
        numbers = [list(range(a, b)) for a, b in pairwise(first)]
        reads = numbers[3]
        simulated = simulated_us(
            costs,
            rows,
            numbers[0] + numbers[1][:m],
            numbers[2][:k] + reads[:x],
            reads,
            numbers[1][m:] + numbers[2][k:] + reads[x:],
        )
        assert us == pytest.approx(simulated)
        two = fill(costs, movable, in_host, loading_us, price_us, staying)
        over = fill_from_disk(
            costs, Active(movable, staying, in_host, (), loading_us), link_price_us=price_us
        )
        assert over.makespan_us == pytest.approx(two.makespan_us)
        assert over.num_read == 0


def test_every_active_expert_is_placed_once_and_runs_where_it_can() -> None:
    rng = np.random.default_rng(fresh_seed())
    for _ in range(100):
        on_device, in_host = (residency_of(rng, 32, tier) for tier in (Tier.DEVICE, Tier.HOST))
        rows = random_rows(rng, int(rng.integers(0, 33)), 32)
        placement = scheduler(random_costs(rng, link=(0.2, 4), disk=(0.5, 15)), in_host).place(
            use_of(rows), on_device
        )
        placed = placement.on_device + placement.fetch_first + placement.on_cpu
        assert sorted(placed) == np.flatnonzero(rows).tolist()
        assert on_device.ready.issuperset(placement.on_device)
        assert on_device.ready.isdisjoint(placement.fetch_first)
        # what the CPU would have to read, although it is on the device, stays there
        assert in_host.ready.issuperset(on_device.ready.intersection(placement.on_cpu))


def test_what_a_read_saves_is_what_the_layer_takes_longer_without_it() -> None:
    costs = random_costs(np.random.default_rng(fresh_seed()), link=(0.2, 4), disk=(0.5, 15))
    reads = ReadsBelowDevice({0: costs})
    assert reads.fetch_us(0) == costs.disk_us(10**6)
    nothing = Residency(0, Tier.DEVICE, 4, frozenset())
    for num_absent in range(5):
        in_host = Residency(0, Tier.HOST, 4, frozenset(range(4 - num_absent)))
        placement = scheduler(costs, in_host).place(use_of(np.ones(4, np.int32)), nothing)
        took_us = placed_us(costs, np.ones(4, np.int32), placement, in_host.ready)
        assert reads.layer_us(0, 4 - num_absent, num_absent, 1) == pytest.approx(took_us)
