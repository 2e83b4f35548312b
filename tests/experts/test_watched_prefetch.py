"""Prefetching that stops predicting where that takes more time than it saves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from support.randomness import fresh_seed

from moeserve.cache.expert_cache import ExpertCache, Load, Tier
from moeserve.cache.policies.registry import build_policy
from moeserve.core import ExpertKey, LayerUse, Placement
from moeserve.experts.prefetch import WatchedPrefetch
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.curve import Curve
from moeserve.experts.schedule.intra_layer import FetchOrder, TimelinePlacement
from moeserve.predictors.base import Prediction

LAYERS, EXPERTS, TOP_K = 3, 8, 2
LAYER_US = 1000.0


class Engine:
    """An engine's side: steps whose experts are known beforehand, so that no guess is wrong."""

    def __init__(self, fetch_us: float, predict_us: float, num_slots: int = 12) -> None:
        num_experts = dict.fromkeys(range(LAYERS), EXPERTS)
        costs = CostModel(
            expert_bytes=1000,
            cpu=Curve([1], [1.0]),
            cpu_start_us=0.0,
            disk=Curve([1000], [fetch_us]),
        )
        self.rng = np.random.default_rng(fresh_seed())
        self.cache = ExpertCache(
            Tier.HOST, num_experts, num_slots, build_policy("lru", num_experts)
        )
        self.predict_us = predict_us
        self.now_us = 0.0
        self.begun: list[Load] = []
        self.scheduler = WatchedPrefetch(
            self.cache,
            FetchOrder(dict.fromkeys(num_experts, costs)),
            self.begun.extend,
            lambda: 0.0,
            1,
            lambda: self.now_us / 1e6,
        )
        self.wanted = self._draw()

    def _draw(self) -> tuple[int, ...]:
        return tuple(self.rng.choice(EXPERTS, TOP_K, replace=False).tolist())

    def run_layer(self, layer: int) -> bool:
        """Whether it was asked what follows."""
        self.now_us += LAYER_US
        for load in self.begun:
            self.cache.complete(load.key)
        self.begun.clear()
        ready = self.cache.residency(layer).ready
        there = tuple(e for e in self.wanted if e in ready)
        absent = tuple(e for e in self.wanted if e not in ready)
        placement = Placement(layer, fetch_first=absent, on_cpu=there)
        with self.cache.acquire(placement) as slots:
            self.wanted = self._draw()
            asked = self.scheduler.looks_ahead(layer)
            prediction = Prediction()
            if asked:
                self.now_us += self.predict_us
                chances = torch.full((EXPERTS,), 0.01)
                chances[list(self.wanted)] = 0.99
                prediction = Prediction({(layer + 1) % LAYERS: chances})
            self.scheduler.prefetch(prediction, placement)
            for load in slots.loads:
                self.cache.complete(load.key)
        self.cache.check_integrity()
        return asked

    def run(self, steps: int) -> float:
        """The share of calls in which it was asked."""
        asked = [self.run_layer(layer) for _ in range(steps) for layer in range(LAYERS)]
        return sum(asked) / len(asked)


def test_reads_that_take_longer_than_predicting_are_foreseen() -> None:
    assert Engine(fetch_us=500.0, predict_us=50.0).run(1500) == 1.0


def test_reads_shorter_than_predicting_are_left_to_the_step() -> None:
    engine = Engine(fetch_us=20.0, predict_us=200.0)
    assert engine.run(300) == 1.0, "too little is known"
    engine.run(300)
    assert engine.run(1000) < 0.1
    engine.predict_us = 1.0
    engine.run(6000)  # the longest pause
    assert engine.run(300) == 1.0, "it was tried again"


def test_nothing_is_asked_where_every_expert_has_come_in() -> None:
    engine = Engine(fetch_us=500.0, predict_us=1.0, num_slots=LAYERS * EXPERTS)
    engine.run(500)
    assert engine.cache.holds_everything
    assert engine.run(20) == 0.0


def test_what_others_are_told_is_not_followed_while_it_rests() -> None:
    engine = Engine(fetch_us=20.0, predict_us=200.0)
    engine.run(600)
    while engine.run_layer(0):
        pass
    assert not engine.scheduler.looks_ahead(0)
    chances = torch.linspace(0.0, 1.0, EXPERTS)
    engine.scheduler.prefetch(Prediction({1: chances}), Placement(0))
    assert not engine.begun


def test_a_try_begins_with_a_step_whatever_became_of_the_steps_before() -> None:
    """Steps break off, and not every layer of them is asked about."""
    engine = Engine(fetch_us=20.0, predict_us=200.0)
    asked: list[tuple[int, bool]] = []
    for _ in range(3000):
        first, last = sorted(engine.rng.integers(LAYERS, size=2).tolist())
        first = 0 if engine.rng.random() < 0.5 else first
        asked.append((-1, False))
        asked += [(layer, engine.run_layer(layer)) for layer in range(first, last + 1)]
    changes = [
        before for (before, was), (_, now) in pairwise(asked) if now and not was and before >= 0
    ]
    assert any(now for _, now in asked[1500:]), "it is tried again"
    assert not changes, "begun in the middle of a step"


DEVICE_COSTS = CostModel(
    expert_bytes=1000,
    cpu=Curve([1], [100.0]),
    cpu_start_us=10.0,
    device=Curve([1], [5.0]),
    device_start_us=3.0,
    link=Curve([1000], [200.0]),
)


class DeviceEngine:
    """Of every layer, experts 0 and 1 are always used: the policy has seen it."""

    def __init__(self) -> None:
        num_experts = dict.fromkeys(range(LAYERS), EXPERTS)
        self.cache = ExpertCache(Tier.DEVICE, num_experts, 6, build_policy("score", num_experts))
        self.begun: list[Load] = []
        self.scheduler = WatchedPrefetch(
            self.cache,
            TimelinePlacement(dict.fromkeys(num_experts, DEVICE_COSTS)),
            self.begun.extend,
            lambda: 0.0,
            LAYERS,
            lambda: 0.0,
            left_us=lambda: 0.0,
        )
        rows = np.zeros(EXPERTS, np.int32)
        rows[:2] = 1
        for _ in range(100):
            for layer in range(LAYERS):
                self.cache.observe(LayerUse(layer, rows, rows / np.float32(2)))
        for layer, expert in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
            for load in self.cache.prefetch([ExpertKey(layer, expert)]):
                self.cache.complete(load.key)

    def bring(self, chances: torch.Tensor) -> None:
        """Expert 1 of layer 1, the only one that is lacking, after these chances were told."""
        self.scheduler.prefetch(Prediction({1: chances}), Placement(0, on_device=(0, 1)))
        (load,) = self.begun
        assert load.key == ExpertKey(1, 1)
        self.cache.complete(load.key)


def test_a_copy_for_later_uses_is_no_prediction() -> None:
    engine = DeviceEngine()
    chances = torch.full((EXPERTS,), 0.05)
    chances[0] = 0.99
    engine.bring(chances)
    engine.scheduler.prefetch(Prediction(), Placement(1, on_device=(0,)))
    assert engine.scheduler.usefulness.useful_share(0, 1) is None
    assert engine.scheduler._returns.saved_us == 0


def test_a_copy_that_was_predicted_saves_the_cpu_its_work_not_the_link_its_own() -> None:
    engine = DeviceEngine()
    chances = torch.full((EXPERTS,), 0.01)
    chances[1] = 0.99
    engine.bring(chances)
    engine.scheduler.prefetch(Prediction(), Placement(1, on_device=(0, 1)))
    assert engine.scheduler.usefulness.useful_share(0, 1) == 1
    assert engine.scheduler._returns.saved_us == 100.0 - 5.0
