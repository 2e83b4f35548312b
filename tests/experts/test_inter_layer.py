"""What is prefetched, in which order, and what is left alone: on a real cache and placement."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from support.prefetch_bench import COSTS, EXPERTS, LAYERS, PrefetchBench
from support.randomness import fresh_seed

from moeserve.cache.expert_cache import ExpertCache, ExpertState, Tier
from moeserve.cache.policies.registry import build_policy
from moeserve.core import ExpertKey, Placement
from moeserve.cpu_backend import _native
from moeserve.experts.schedule.inter_layer import Candidate, ImpactPrefetch, choose
from moeserve.experts.schedule.intra_layer import FetchOrder, TimelinePlacement
from moeserve.predictors.base import Prediction


class Bench(PrefetchBench):
    """An engine's side of the scheduler: a clock that it sets, a mover that only notes."""

    def __init__(self, num_slots: int = 16, tier: Tier = Tier.DEVICE, depth: int = 3) -> None:
        num_experts = dict.fromkeys(range(LAYERS), EXPERTS)
        policy = build_policy("lru", num_experts)
        super().__init__(ExpertCache(tier, num_experts, num_slots, policy))
        costs = dict.fromkeys(num_experts, COSTS)
        kind = TimelinePlacement if tier is Tier.DEVICE else FetchOrder
        self.intra = kind(costs)
        self.depth = depth
        self.scheduler = ImpactPrefetch(
            self.cache,
            self.intra,
            self.start,
            lambda layer: self.depth,
            lambda: self.now_us / 1e6,
        )

    def call(
        self, layer: int, chances: dict[int, dict[int, float]], placement: Placement | None = None
    ) -> list[ExpertKey]:
        """What one call begins; chances by layer and expert, others 0.01."""
        found = {}
        for later, by_expert in chances.items():
            values = torch.full((EXPERTS,), 0.01)
            for expert, chance in by_expert.items():
                values[expert] = chance
            found[later] = values
        self.begun.clear()
        self.scheduler.prefetch(Prediction(found), placement or Placement(layer))
        self.cache.check_integrity()
        return list(self.begun)


def test_the_likeliest_absent_expert_is_brought_and_what_is_there_is_not() -> None:
    bench = Bench()
    bench.hold((1, 0))
    assert bench.call(0, {1: {0: 0.9, 3: 0.8, 5: 0.4}}) == [(1, 3)]


def test_nothing_is_predicted_nothing_is_moved() -> None:
    bench = Bench()
    assert bench.call(0, {}) == []
    assert bench.call(1, {2: dict.fromkeys(range(EXPERTS), 0.5)}) == []
    bench.depth = 0
    assert bench.call(2, {3: {1: 0.99}}) == []


def test_layers_beyond_the_depth_are_left_alone_and_layers_are_a_ring() -> None:
    bench = Bench(depth=2)
    assert bench.call(1, {0: {1: 0.99}}) == []  # three layers on
    assert bench.call(3, {0: {1: 0.99}, 2: {4: 0.99}}) == [(0, 1)]


def test_the_link_is_filled_until_the_next_call_and_no_further() -> None:
    """Calls 500 us apart, 200 us for a transfer: three begin, and none while they last."""
    bench = Bench()
    wish = {3: {1: 0.9, 2: 0.9, 3: 0.9, 4: 0.9, 5: 0.9}}
    bench.call(0, {})
    bench.now_us = 500.0
    assert len(bench.call(1, wish)) == 3
    bench.now_us = 550.0
    assert bench.call(1, wish) == []
    bench.arrive()
    bench.now_us = 1150.0
    assert len(bench.call(1, wish)) >= 1


def test_loads_that_wait_behind_demands_do_not_pile_up() -> None:
    """By the clock the link is long free; but nothing has arrived."""
    bench = Bench()
    bench.call(0, {})
    bench.now_us = 250.0
    begun = bench.call(1, {2: {1: 0.9, 2: 0.9, 3: 0.9, 4: 0.9}})
    for _ in range(10):
        bench.now_us += 250.0
        begun += bench.call(1, {2: {1: 0.9, 2: 0.9, 3: 0.9, 4: 0.9}})
    assert len(begun) <= 3


def test_what_would_come_too_late_gives_way_to_what_would_not() -> None:
    bench = Bench()
    bench.call(0, {})
    bench.now_us = 60.0  # 200 us for a transfer: the next layer begins long before
    assert bench.call(0, {1: {1: 0.9}, 3: {2: 0.7}}) == [(3, 2)]


def test_a_pause_between_requests_is_no_period() -> None:
    bench = Bench()
    for _ in range(5):
        bench.call(0, {})
        bench.now_us += 100.0
    bench.now_us += 60e6
    assert len(bench.call(0, {1: dict.fromkeys(range(3), 0.9)})) <= 1


def test_host_over_disk_brings_no_more_than_what_is_predicted() -> None:
    """There `on_cpu` are the resident ones, and what was absent has been read already."""
    bench = Bench(tier=Tier.HOST)
    bench.hold((0, 1))
    assert bench.call(0, {}, Placement(0, on_cpu=(1,))) == []
    assert bench.call(0, {1: {2: 0.9}}, Placement(0, on_cpu=(1,))) == [(1, 2)]


def test_the_running_layer_is_never_evicted() -> None:
    bench = Bench(num_slots=3)
    bench.hold((0, 0), (0, 1), (0, 2))
    running = Placement(0, on_device=(0, 1, 2))
    assert bench.call(0, {1: {5: 0.99}}, running) == []
    assert bench.call(0, {1: {5: 0.99}}, Placement(0, on_device=(0, 1))) == [(1, 5)]
    assert bench.cache.residency(0).ready == {0, 1}


def test_random_predictions_begin_only_absent_experts_of_predicted_layers() -> None:
    rng = np.random.default_rng(fresh_seed())
    bench = Bench(num_slots=12)
    for step in range(300):
        layer = step % LAYERS
        later = {(layer + 1 + d) % LAYERS: rng.random(EXPERTS) ** 4 for d in range(2)}
        absent = {
            ExpertKey(k, e)
            for k in later
            for e in range(EXPERTS)
            if bench.cache.state(ExpertKey(k, e)) is ExpertState.ABSENT
        }
        bench.begun.clear()
        found = {k: torch.from_numpy(p.astype(np.float32)) for k, p in later.items()}
        bench.scheduler.prefetch(Prediction(found), Placement(layer))
        bench.cache.check_integrity()
        assert absent.issuperset(bench.begun)
        bench.now_us += float(rng.uniform(10, 600))
        if rng.random() < 0.7:
            bench.arrive()


def test_impact_is_the_time_that_the_layer_is_shorter() -> None:
    """Layer 1 will want two experts, none there: 205 us (one is fetched, one on the CPU), or 110 us
    with one brought. Layer 2 will want two, which are there, perhaps a third: 110 us, or 13 us."""
    bench = Bench()
    bench.hold((2, 0), (2, 1))
    chances = {1: {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5}, 2: {0: 0.9, 1: 0.9, 2: 0.6}}
    for num_absent, expected_us in ((0, 13.0), (1, 110.0), (2, 205.0)):
        assert bench.intra.layer_us(2, 2, num_absent, 1) == pytest.approx(expected_us)
    bench.now_us = 0.0
    bench.call(0, {})
    bench.now_us = 1000.0
    begun = bench.call(0, chances)
    assert begun[0] == (2, 2)  # (0.6 - 0.31) * 97 us; layer 1: (0.5 - 0.26) * 95 us
    assert set(begun[1:]) <= {(1, e) for e in range(4)}


def test_choose_takes_what_nets_most_when_it_moves_next() -> None:
    rng = np.random.default_rng(fresh_seed())
    for _ in range(100):
        layers = []
        for layer in range(3):
            gains = sorted(rng.uniform(0, 100, int(rng.integers(0, 5))), reverse=True)
            slack_us = float(rng.uniform(0, 500))
            layers.append(
                [
                    Candidate(ExpertKey(layer, e), gain, float(rng.random()), slack_us)
                    for e, gain in enumerate(gains)
                ]
            )
        busy_us, room = float(rng.uniform(0, 300)), int(rng.integers(1, 6))
        chosen, price_us = choose(layers, busy_us, 100.0, room)
        assert len(chosen) <= room
        left = [list(of_layer) for of_layer in layers]
        for position, candidate in enumerate(chosen, start=1):
            arrives_us = busy_us + position * 100.0
            heads = [of_layer[0] for of_layer in left if of_layer]
            assert candidate in heads
            assert candidate.net_us(arrives_us) == max(h.net_us(arrives_us) for h in heads)
            assert candidate.net_us(arrives_us) > 0
            left[candidate.key.layer].pop(0)
        if len(chosen) == room:
            assert price_us == chosen[-1].net_us(busy_us + room * 100.0)
        else:
            arrives_us = busy_us + (len(chosen) + 1) * 100.0
            assert all(o[0].net_us(arrives_us) <= 0 for o in left if o)
            assert price_us == 0


@pytest.mark.parametrize("ties", [False, True])
def test_likely_absent_experts_are_those_that_sorting_gives(ties: bool) -> None:
    rng = np.random.default_rng(fresh_seed())
    for _ in range(200):
        sizes = rng.integers(1, 20, rng.integers(1, 7)).tolist()
        chances = rng.random(sum(sizes)).astype(np.float32) ** 3
        if ties:
            chances = np.round(chances, 1)
        absent = rng.random(sum(sizes)) < rng.random()
        expected = []
        starts = np.cumsum([0, *sizes]).tolist()
        for place, (start, stop) in enumerate(pairwise(starts)):
            own, away = chances[start:stop].astype(np.float64), absent[start:stop]
            order = np.argsort(-own, kind="stable")
            likely = [
                e for e in order.tolist() if away[e] and own[e] > sum(own.tolist()) / len(own)
            ]
            if likely:
                wanted = order[: max(1, round(sum(own.tolist())))]
                count = int(away[wanted].sum())
                expected.append((place, sum(own.tolist()), count, likely, own[likely].tolist()))
        assert _native.likely_absent(chances, absent, sizes) == expected


def test_likely_absent_refuses_what_does_not_fit() -> None:
    chances, absent = np.ones(3, np.float32), np.ones(3, np.bool_)
    with pytest.raises(ValueError, match="sizes: 0 is below 1"):
        _native.likely_absent(chances, absent, [3, 0])
    with pytest.raises(ValueError, match=r"chances: shape \[3\], expected \[4\]"):
        _native.likely_absent(chances, absent, [4])
    with pytest.raises(ValueError, match="absent: must be bool"):
        _native.likely_absent(chances, np.ones(3, np.uint8), [3])
