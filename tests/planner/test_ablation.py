"""The decode ablation on small random routing: bounds that hold for every strategy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.randomness import fresh_seed

from moeserve.core import ExpertKey
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.curve import Curve
from moeserve.planner.ablation import (
    STRATEGIES,
    DecodeSimulation,
    Setting,
    Strategy,
    all_resident_us,
    popularity,
)
from moeserve.predictors.base import Prediction

LAYERS, EXPERTS, CHOSEN, TOKENS = 4, 16, 3, 60
COSTS = CostModel(
    expert_bytes=1000,
    cpu=Curve([1, 2], [160.0, 170.0]),
    cpu_start_us=20.0,
    device=Curve([1], [13.0]),
    device_start_us=20.0,
    shared_us=5.0,
    link=Curve([1000], [200.0]),
)


def routing(rng: np.random.Generator) -> np.ndarray:
    """[T, L, K]: experts of uneven popularity that change slowly."""
    ids = np.zeros((TOKENS, LAYERS, CHOSEN), np.int64)
    weights = rng.random((LAYERS, EXPERTS)) ** 3
    for token in range(TOKENS):
        if token % 20 == 0:
            weights = rng.random((LAYERS, EXPERTS)) ** 3
        for layer in range(LAYERS):
            share = weights[layer] / weights[layer].sum()
            ids[token, layer] = rng.choice(EXPERTS, CHOSEN, replace=False, p=share)
    return ids


def truth(ids: np.ndarray) -> list[list[Prediction]]:
    """What comes in the next layer."""
    found = []
    for token in range(TOKENS):
        row = []
        for layer in range(LAYERS):
            later = (layer + 1) % LAYERS
            at = min(token + (layer + 1) // LAYERS, TOKENS - 1)
            chances = torch.full((EXPERTS,), 0.001)
            chances[ids[at, later]] = 0.999
            row.append(Prediction({later: chances}))
        found.append(row)
    return found


def setting_of(ids: np.ndarray, num_slots: int, policy: str = "lru") -> Setting:
    return Setting(
        costs=COSTS,
        between_us=60.0,
        num_experts=EXPERTS,
        num_layers=LAYERS,
        num_slots=num_slots,
        popular=popularity(ids[:30], EXPERTS),
        policy=policy,
        depth=1,
    )


def test_popularity_counts_uses() -> None:
    ids = np.array([[[1, 2], [0, 1]], [[1, 3], [0, 3]], [[1, 2], [0, 2]]])
    ranked = popularity(ids, 4)
    assert set(ranked[:2]) == {ExpertKey(0, 1), ExpertKey(1, 0)}
    assert ranked[2] == ExpertKey(0, 2)
    assert len(ranked) == 8


def test_static_takes_the_time_of_its_misses() -> None:
    ids = routing(np.random.default_rng(fresh_seed()))
    setting = setting_of(ids, 24)
    there = set(setting.popular[:24])
    total_us, hits = 0.0, 0
    for token in ids:
        for layer, chosen in enumerate(token):
            found = sum(ExpertKey(layer, int(e)) in there for e in chosen)
            missed = CHOSEN - found
            device_us = 25.0 + 13.0 * found
            cpu_us = 20.0 + 160.0 * missed if missed else 0.0
            total_us += max(device_us, cpu_us) + 60.0
            hits += found
    outcome = DecodeSimulation(STRATEGIES[0], setting).run(ids, truth(ids))
    assert outcome.token_us == pytest.approx(total_us / TOKENS)
    assert outcome.hit_rate == pytest.approx(hits / ids.size)
    assert outcome.link_busy == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("policy", ["lru", "score"])
def test_every_strategy_lies_between_its_bounds(strategy: Strategy, policy: str) -> None:
    ids = routing(np.random.default_rng(fresh_seed()))
    for num_slots in (16, 32, 48):
        setting = setting_of(ids, num_slots, policy)
        outcome = DecodeSimulation(strategy, setting).run(ids, truth(ids))
        assert outcome.token_us >= all_resident_us(setting, CHOSEN) - 1e-6
        cpu_alone_us = LAYERS * (20.0 + CHOSEN * 160.0 + 60.0)
        assert outcome.token_us <= cpu_alone_us * 1.01
        assert 0 <= outcome.link_busy <= 1 + 1e-9
        assert outcome.useful_prefetches <= 1


def test_everything_resident_is_the_bound() -> None:
    ids = routing(np.random.default_rng(fresh_seed()))
    setting = setting_of(ids, LAYERS * EXPERTS)
    outcome = DecodeSimulation(STRATEGIES[-1], setting).run(ids, truth(ids))
    assert outcome.token_us == pytest.approx(all_resident_us(setting, CHOSEN))
    assert outcome.hit_rate == 1


def test_knowing_what_comes_pays() -> None:
    ids = routing(np.random.default_rng(fresh_seed()))
    setting = setting_of(ids, 24)
    static, *_, whole = STRATEGIES
    plain = DecodeSimulation(static, setting).run(ids, truth(ids))
    told = DecodeSimulation(whole, setting).run(ids, truth(ids))
    assert told.token_us < plain.token_us
    assert told.prefetches_per_token > 0
