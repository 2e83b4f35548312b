"""What is copied to a device ahead of time: by what it saves now and later, on a real cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from support.prefetch_bench import COSTS, EXPERTS, LAYERS, PrefetchBench
from support.randomness import fresh_seed

from moeserve.cache.expert_cache import ExpertCache, ExpertState, Tier
from moeserve.cache.policies.registry import build_policy
from moeserve.core import ExpertKey, LayerUse, Placement
from moeserve.experts.schedule.device_prefetch import KEPT, DevicePrefetch
from moeserve.experts.schedule.intra_layer import TimelinePlacement
from moeserve.predictors.base import Prediction

SAVED_US = 95.0  # by a use on the device


class Bench(PrefetchBench):
    """An engine's side of the scheduler: a clock and a link that it sets."""

    def __init__(self, policy: str = "score", num_slots: int = 16) -> None:
        num_experts = dict.fromkeys(range(LAYERS), EXPERTS)
        chosen = build_policy(policy, num_experts)
        super().__init__(ExpertCache(Tier.DEVICE, num_experts, num_slots, chosen))
        self.intra = TimelinePlacement(dict.fromkeys(num_experts, COSTS))
        self.left_us = 0.0
        self.not_in_host: set[ExpertKey] = set()
        self.num_asked = 0
        self.scheduler = DevicePrefetch(
            self.cache,
            self.intra,
            self.start,
            lambda layer: 3,
            lambda: self.now_us / 1e6,
            self.which_in_host,
            left_us=lambda: self.left_us,
        )

    def which_in_host(self, numbers: np.ndarray) -> np.ndarray:
        self.num_asked += 1
        keys = [self.cache.numbers.key(n) for n in numbers.tolist()]
        return np.array([key not in self.not_in_host for key in keys], np.bool_)

    def use(self, layer: int, *experts: int) -> LayerUse:
        rows = np.zeros(EXPERTS, np.int32)
        rows[list(experts)] = 1
        return LayerUse(layer, rows, rows / np.float32(len(experts)))

    def uses(self, layer: int, expert: int) -> float:
        """That the policy expects."""
        numbers = self.cache.numbers.of(layer, [expert])
        return float(self.cache.policy.uses_to_come(numbers)[0])

    def call(
        self, placement: Placement, chances: Mapping[int, Mapping[int, float]] | None = None
    ) -> list[ExpertKey]:
        """What one call begins; chances by layer and expert, others 0.01."""
        found = {}
        for later, by_expert in (chances or {}).items():
            values = torch.full((EXPERTS,), 0.01)
            for expert, chance in by_expert.items():
                values[expert] = chance
            found[later] = values
            self.cache.expect(later, values.numpy())
        self.begun.clear()
        self.scheduler.prefetch(Prediction(found), placement)
        self.cache.check_integrity()
        return list(self.begun)


def learnt(bench: Bench, steps: int = 200) -> None:
    """Of every layer, experts 0 and 1 are always used, 7 every tenth time, others never."""
    for step in range(steps):
        for layer in range(LAYERS):
            bench.cache.observe(bench.use(layer, 0, 1, *([7] if step % 10 == 0 else [])))


def test_a_policy_that_says_nothing_of_later_leaves_the_link_to_what_the_cpu_ran() -> None:
    bench = Bench("lru")
    bench.hold((0, 1))
    assert bench.call(Placement(0, on_device=(1,), on_cpu=(4, 6))) == [(0, 4)]
    bench.arrive()
    bench.not_in_host = {ExpertKey(0, 5)}
    assert bench.call(Placement(0, on_device=(1,), on_cpu=(5, 6))) == [(0, 6)]


def test_what_is_there_already_takes_no_room_of_what_the_cpu_ran() -> None:
    bench = Bench("lru")
    bench.hold((0, 1))
    assert bench.call(Placement(0, on_cpu=(1, 4))) == [(0, 4)]


def test_the_source_is_asked_once_for_all_that_it_lacks() -> None:
    bench = Bench()
    learnt(bench)
    bench.not_in_host = {ExpertKey(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)}
    assert bench.call(Placement(0, on_cpu=(4,))) == []
    assert bench.num_asked <= 2
    bench.num_asked = 0
    assert bench.call(Placement(1, on_cpu=(4,)), {2: {1: 0.9}, 3: {1: 0.9}}) == []
    assert bench.num_asked <= 4, "once more for each layer that is predicted"


def test_uses_to_come_rise_with_use_and_are_bounded() -> None:
    bench = Bench()
    learnt(bench)
    often, now_and_then, never = (bench.uses(2, expert) for expert in (0, 7, 4))
    assert 0 < never < now_and_then < often <= 1 / (1 - np.exp(-0.01))


def test_the_expert_with_most_uses_to_come_is_brought_whatever_its_layer() -> None:
    bench = Bench()
    learnt(bench)
    bench.hold(*((layer, expert) for layer in range(LAYERS) for expert in (0, 1) if layer != 2))
    bench.hold((2, 0))
    assert bench.call(Placement(0, on_device=(0,), on_cpu=(4,))) == [(2, 1)]


def test_nothing_goes_for_what_is_worth_less() -> None:
    bench = Bench(num_slots=8)
    learnt(bench)
    bench.hold(*((layer, expert) for layer in range(LAYERS) for expert in (0, 1)))
    assert bench.call(Placement(0, on_device=(0, 1), on_cpu=(4,))) == []
    # ... and what is sure to be wanted only once is not worth (1, 0), which is always wanted,
    assert bench.call(Placement(3, on_device=(0, 1)), {1: {4: 0.3}}) == []
    # but more than what is hardly ever wanted.
    bench = Bench(num_slots=8)
    learnt(bench)
    bench.hold(*((layer, expert) for layer in range(LAYERS) for expert in (0, 1) if layer != 2))
    bench.hold((2, 3), (2, 4))
    bench.not_in_host = {ExpertKey(2, 0), ExpertKey(2, 1)}
    assert bench.call(Placement(3, on_device=(0, 1)), {1: {4: 0.9}}) == [(1, 4)]


def test_the_link_is_filled_for_as_long_as_this_layer_lasts() -> None:
    """50 us between layers; the layers themselves take 10 us, and one takes 110."""
    bench = Bench(num_slots=4)
    wish = {3: dict.fromkeys(range(5), 0.9)}
    for _ in range(100):
        bench.call(bench.intra.place(bench.use(0, 0), bench.cache.residency(0)))
        bench.arrive()
        bench.now_us += bench.intra.placed_us + 50.0
    bench.left_us = 100.0
    resident = bench.use(0, 0)
    placement = bench.intra.place(resident, bench.cache.residency(0))
    assert bench.intra.placed_us == pytest.approx(8.0)
    assert bench.call(placement, wish) == []
    bench.now_us += bench.intra.placed_us + 50.0
    placement = bench.intra.place(bench.use(0, 0, 5), bench.cache.residency(0))
    assert bench.intra.placed_us == pytest.approx(110.0)
    assert len(bench.call(placement, wish)) == 1


def test_of_experts_with_as_many_rows_the_one_worth_most_is_fetched() -> None:
    bench = Bench()
    learnt(bench)
    placement = bench.intra.place(bench.use(1, 2, 3, 4, 7), bench.cache.residency(1))
    assert placement.fetch_first == (7,)
    rows = np.array([0, 0, 2, 1, 1, 0, 0, 1], np.int32)
    placement = bench.intra.place(LayerUse(1, rows, rows / np.float32(5)), bench.cache.residency(1))
    assert placement.fetch_first == (2,)


def test_what_a_fetch_leaves_behind_counts_against_the_price_of_the_link() -> None:
    bench = Bench()
    learnt(bench)
    bench.intra.link_price_us = price_us = KEPT * SAVED_US * bench.uses(1, 0)
    worth_it = bench.intra.place(bench.use(1, 0, 2, 3), bench.cache.residency(1))
    assert worth_it.fetch_first == (0,)  # 210 us instead of 310
    bench.intra.link_price_us = price_us + 101.0
    assert not bench.intra.place(bench.use(1, 0, 2, 3), bench.cache.residency(1)).fetch_first


def test_random_calls_keep_to_the_room_and_to_what_is_absent() -> None:
    rng = np.random.default_rng(fresh_seed())
    bench = Bench(num_slots=12)
    for step in range(300):
        layer = step % LAYERS
        use = bench.use(layer, *rng.choice(EXPERTS, 3, replace=False).tolist())
        placement = bench.intra.place(use, bench.cache.residency(layer))
        bench.cache.observe(use)
        bench.not_in_host = {ExpertKey(1, int(rng.integers(EXPERTS)))}
        with bench.cache.acquire(placement) as slots:
            for load in slots.loads:
                bench.cache.complete(load.key)
            keys = [ExpertKey(k, e) for k in range(LAYERS) for e in range(EXPERTS)]
            absent = {key for key in keys if bench.cache.state(key) is ExpertState.ABSENT}
            bench.left_us = float(rng.uniform(0, 400))
            chances = {
                (layer + d) % LAYERS: dict(enumerate((rng.random(EXPERTS) ** 4).tolist()))
                for d in (1, 2)
            }
            begun = bench.call(placement, chances)
        assert absent.issuperset(begun)
        assert not bench.not_in_host.intersection(begun)
        assert len(begun) <= 3
        bench.now_us += bench.intra.placed_us + 50.0
        bench.arrive()
