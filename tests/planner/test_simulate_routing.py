"""Drawn routing is as local as what it stands for; recorded routing is kept in its order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import engine_profile as made
from support.engine_profile import read_config
from support.routing_samples import topical_trace

from moeserve.cache.numbering import ExpertNumbers
from moeserve.cache.policies.lru import LruPolicy
from moeserve.cache.replay import Contender, Rules, TierReplay, replay
from moeserve.cache.routing_trace import Request, RoutingTrace
from moeserve.planner.shapes import ModelShape
from moeserve.planner.simulate.routing import (
    HIGH_SKEW,
    LOW_SKEW,
    MID_SKEW,
    SimulatedRouting,
    drawn,
    recorded,
)


@pytest.fixture
def gpt_oss(tmp_path: Path) -> ModelShape:
    """Experts as of gpt-oss-20b, 4 of 32."""
    changes = {"num_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 12}
    return read_config(tmp_path, {**made.CALIBRATED, **changes})


def lru_hit_rate(routing: SimulatedRouting, share: float) -> float:
    """Of one stream, every layer with slots of its own, after a start."""
    layers = tuple(range(len(routing.layers)))
    trace = RoutingTrace("drawn", routing.ids, routing.weights, (), routing.num_experts, layers)
    numbers = ExpertNumbers(trace.experts_per_layer)
    tier = TierReplay(numbers, Rules(share, per_layer=True))
    steps = [np.array([token]) for token in range(400)]
    asked = replay(trace, steps, [Contender("lru", LruPolicy(numbers), [tier])])
    return float(np.sum(tier.hits[100:]) / asked[100:].sum())


def test_the_most_skewed_default_is_like_gpt_oss(gpt_oss: ModelShape) -> None:
    """Recorded: 0.647 of uses hit with slots for a quarter of a layer, 0.888 for half."""
    rates = [lru_hit_rate(drawn(HIGH_SKEW, gpt_oss, 1), share) for share in (0.25, 0.5)]
    assert rates == pytest.approx([0.647, 0.888], abs=0.05)
    lower = [lru_hit_rate(drawn(skew, gpt_oss, 1), 0.25) for skew in (LOW_SKEW, MID_SKEW)]
    assert 0.25 < lower[0] < lower[1] < rates[0]


def test_drawn_tokens_take_no_expert_twice(gpt_oss: ModelShape) -> None:
    routing = drawn(MID_SKEW, gpt_oss, 2)
    assert len(routing.layers) == 8, "some layers stand for all"
    assert routing.share == 8 / 12
    ordered = np.sort(routing.ids, axis=2)
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    assert routing.weights.sum(2) == pytest.approx(1.0, abs=1e-5)
    assert (drawn(MID_SKEW, gpt_oss, 2).ids == routing.ids).all()


def test_uses_count_rows_and_weights(gpt_oss: ModelShape) -> None:
    routing = drawn(MID_SKEW, gpt_oss, 3)
    tokens = np.array([5, 9, 5])
    rows, weights = routing.uses(tokens)
    for layer in range(len(routing.layers)):
        for expert in range(32):
            chosen = routing.ids[tokens, layer] == expert
            assert rows[layer, expert] == chosen.sum()
            wanted = routing.weights[tokens, layer][chosen].sum()
            assert weights[layer, expert] == pytest.approx(wanted, rel=1e-5)


def test_answers_are_the_ends_of_recorded_requests(tmp_path: Path) -> None:
    model = read_config(tmp_path, {**made.CALIBRATED, "num_experts": 16})
    trace = topical_trace(3, num_tokens=30, num_layers=2, num_experts=16, top_k=2)
    trace = replace(trace, requests=(Request(0, 10, ""), Request(10, 20, "")), num_experts=16)
    routing = recorded(trace, model)
    # prompts of 6 and answers of 4: recorded prompts are 0 to 5 and 10 to 25
    prompts = [*range(6), *range(10, 26)]
    first = routing.places(0, np.arange(10), 6, 4)
    assert first.tolist() == [*prompts[:6], 6, 7, 8, 9]
    second = routing.places(1, np.arange(10), 6, 4)
    assert second.tolist() == [*prompts[6:12], 26, 27, 28, 29]
    long = routing.places(0, np.arange(40), 30, 10)
    assert set(long[30:].tolist()) == {5, 6, 7, 8, 9}


def test_more_requests_than_were_recorded_do_not_say_the_same_in_one_step(
    gpt_oss: ModelShape,
) -> None:
    trace = topical_trace(3, 300, num_layers=12, num_experts=32, top_k=4)
    alone = replace(trace, requests=(Request(40, 200, "alone"),), layers=tuple(range(12)))
    routing = recorded(alone, gpt_oss)
    places = [int(routing.places(r, np.array([10 + 3]), 10, 20)[0]) for r in range(8)]
    assert len(set(places)) == 8
    assert 220 <= min(places) <= max(places) < 240, "all within the answer"
