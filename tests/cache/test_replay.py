"""Replays: the fast one against the real cache, and the ways to put steps together."""

from __future__ import annotations

import random

import numpy as np
import pytest
from support.routing_samples import topical_trace

from moeserve.cache.numbering import ExpertNumbers
from moeserve.cache.policies.belady import BeladyPolicy
from moeserve.cache.policies.registry import build_policy
from moeserve.cache.replay import (
    Contender,
    Rules,
    TierReplay,
    all_uses,
    replay,
    through_cache,
)
from moeserve.cache.routing_trace import Request, RoutingTrace, Step, chunks, merged, one_by_one

LEARNT = ("lru", "lfu", "mrs", "least_stale", "score")


def rates(trace: RoutingTrace, steps: list[Step], rules: Rules) -> dict[str, list[int]]:
    numbers = ExpertNumbers(trace.experts_per_layer)
    contenders = [
        Contender(name, build_policy(name, trace.experts_per_layer), [TierReplay(numbers, rules)])
        for name in LEARNT
    ]
    replay(trace, steps, contenders)
    return {c.name: c.tiers[0].hits for c in contenders}


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_fast_replay_hits_what_the_real_cache_hits(chunk: int) -> None:
    seed = random.randrange(2**32)
    trace = topical_trace(seed, num_tokens=120)
    steps = chunks(trace.requests, chunk)
    for share in (0.5, 0.75):
        found = rates(trace, steps, Rules(share))
        for name in LEARNT:
            policy = build_policy(name, trace.experts_per_layer)
            real = through_cache(trace, steps, policy, Rules(share))
            assert found[name] == real, f"{name} at {share}, seed {seed}"


@pytest.mark.parametrize("per_layer", [False, True])
def test_no_policy_beats_belady_and_none_holds_more_than_its_slots(per_layer: bool) -> None:
    seed = random.randrange(2**32)
    trace = topical_trace(seed)
    steps = one_by_one(trace.requests)
    numbers = ExpertNumbers(trace.experts_per_layer)
    for share in (0.25, 0.5):
        found = rates(trace, steps, Rules(share, per_layer))
        found |= rates(trace, steps, Rules(share, per_layer, bypass=True))
        tier = TierReplay(numbers, Rules(share, per_layer, bypass=True, keep_used=False))
        oracle = BeladyPolicy(numbers, all_uses(trace, steps))
        asked = replay(trace, steps, [Contender("belady", oracle, [tier])])
        best = sum(tier.hits)
        assert best <= asked.sum()
        for name, hits in found.items():
            assert sum(hits) <= best, f"{name} at {share}, seed {seed}"


def test_every_expert_in_a_slot_misses_once() -> None:
    trace = topical_trace(random.randrange(2**32))
    steps = one_by_one(trace.requests)
    taken = len({(layer, e) for layer in range(3) for e in trace.ids[:, layer].ravel().tolist()})
    for per_layer in (False, True):
        found = rates(trace, steps, Rules(1.0, per_layer))
        assert {sum(hits) for hits in found.values()} == {trace.ids.size - taken}


def test_foresight_is_told_after_the_layer() -> None:
    trace = topical_trace(random.randrange(2**32), num_tokens=10)
    numbers = ExpertNumbers(trace.experts_per_layer)
    asked: list[tuple[int, int]] = []
    told: list[int] = []

    def look_ahead(layer: int, step: Step) -> dict[int, np.ndarray]:
        asked.append((layer, int(step[0])))
        return {layer: np.zeros(trace.num_experts, np.float32)}

    policy = build_policy("score", trace.experts_per_layer)
    policy.expected = lambda layer, chances: told.append(layer)  # type: ignore[method-assign]
    tier = TierReplay(numbers, Rules(0.5))
    steps = one_by_one(trace.requests[:1])
    replay(trace, steps, [Contender("score", policy, [tier], look_ahead)])
    assert asked == [(layer, t) for t in range(len(steps)) for layer in trace.layers]
    assert told == [layer for layer, _ in asked]


def test_streams_take_the_next_request_when_one_is_done() -> None:
    requests = (Request(0, 2, ""), Request(2, 5, ""), Request(7, 3, ""), Request(10, 1, ""))
    steps = [step.tolist() for step in merged(requests, 2)]
    assert steps == [[0, 2], [1, 3], [4, 7], [5, 8], [6, 9]]


def test_chunks_end_with_their_request() -> None:
    requests = (Request(0, 5, ""), Request(5, 2, ""))
    assert [s.tolist() for s in chunks(requests, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [s.tolist() for s in one_by_one(requests)] == [[t] for t in range(7)]
