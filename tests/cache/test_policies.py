"""Policies expectedst plain models of what they claim."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from support.routing_samples import topical_trace, trace_of

from moeserve.cache.numbering import ExpertNumbers
from moeserve.cache.policies.base import least
from moeserve.cache.policies.belady import BeladyPolicy
from moeserve.cache.policies.least_stale import LeastStalePolicy
from moeserve.cache.policies.lfu import LfuPolicy
from moeserve.cache.policies.lru import LruPolicy
from moeserve.cache.policies.mrs import MrsPolicy
from moeserve.cache.policies.registry import POLICIES, build_policy
from moeserve.cache.policies.reuse_model import GAMMA, ReuseModel
from moeserve.cache.policies.score import ScorePolicy
from moeserve.cache.replay import Contender, Rules, TierReplay, all_uses, replay, uses_of
from moeserve.cache.routing_trace import RoutingTrace, one_by_one
from moeserve.chores import Chores
from moeserve.core import ConfigError, LayerUse

EXPERTS = {1: 4, 3: 6}


def use_of(layer: int, experts: list[int], weights: list[float] | None = None) -> LayerUse:
    size = EXPERTS[layer]
    rows, sums = np.zeros(size, np.int32), np.zeros(size, np.float32)
    rows[experts] = 1
    sums[experts] = 1 / len(experts) if weights is None else weights
    return LayerUse(layer, rows, sums)


def hits(trace: RoutingTrace, policy: object, rules: Rules) -> int:
    tier = TierReplay(ExpertNumbers(trace.experts_per_layer), rules)
    replay(trace, one_by_one(trace.requests), [Contender("", policy, [tier])])  # type: ignore[arg-type]
    return sum(tier.hits)


def test_least_takes_the_smallest_and_breaks_ties_by_number() -> None:
    seed = random.randrange(2**32)
    rng = np.random.default_rng(seed)
    for _ in range(200):
        candidates = rng.permutation(30)[: rng.integers(1, 30)]
        worth = rng.integers(0, 4, len(candidates)).astype(np.float64)
        count = int(rng.integers(1, 12))
        expected = sorted(zip(worth, candidates, strict=True))[:count]
        found = least(candidates, worth, count)
        if count == 1:
            assert worth[list(candidates).index(found[0])] == expected[0][0], seed
        else:
            assert found == [number for _, number in expected], seed


def test_lru_gives_up_what_was_used_longest_ago() -> None:
    seed = random.randrange(2**32)
    trace = topical_trace(seed, num_layers=1)
    slots = 6
    times: dict[int, int] = {}
    expected = 0
    held: set[int] = set()
    for now, token in enumerate(trace.ids[:, 0].tolist()):
        expected += sum(e in held for e in token)
        absent = [e for e in token if e not in held]
        short = len(held) + len(absent) - slots
        if short > 0:
            open_ = sorted(held - set(token), key=lambda e: (times[e], e))
            held -= set(open_[:short])
        held |= set(absent)
        times.update(dict.fromkeys(token, now))
    numbers = ExpertNumbers(trace.experts_per_layer)
    assert hits(trace, LruPolicy(numbers), Rules(slots / 12)) == expected, seed


def test_lfu_gives_up_what_was_used_least_and_then_longest_ago() -> None:
    numbers = ExpertNumbers(EXPERTS)
    policy = LfuPolicy(numbers)
    for experts in ([0, 1], [1, 2], [1, 2], [0, 3]):
        policy.used(1, experts)
    assert policy.victims(np.arange(4), 4) == [3, 2, 0, 1]


def test_mrs_is_its_formula() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    policy = MrsPolicy(ExpertNumbers(EXPERTS), alpha=0.3)
    score = np.zeros(6)
    for _ in range(20):
        weights = np.array([rng.random(), rng.random()])
        experts = rng.sample(range(6), 2)
        policy.observed(use_of(3, experts, weights.tolist()))
        top = np.zeros(6)
        top[experts] = weights / weights.sum()
        score = 0.3 * top + 0.7 * score
    assert np.allclose(policy.worth(np.arange(4, 10)), score, rtol=1e-6), seed


def test_least_stale_takes_what_the_pass_has_not_used_in_order_of_arrival() -> None:
    policy = LeastStalePolicy(ExpertNumbers(EXPERTS))
    for number in (5, 0, 1, 4):
        policy.loaded(number)
    policy.used(1, [0, 1])
    policy.used(3, [0, 1])  # numbers 4 and 5
    policy.used(1, [1])  # the next pass
    assert policy.victims(np.array([0, 1, 4, 5]), 4) == [5, 0, 4, 1]


@pytest.mark.parametrize("bypass", [False, True])
def test_belady_is_the_optimum(bypass: bool) -> None:
    """Against every way to hold experts, on traces short enough to try them all."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(20):
        tokens = [[[rng.randrange(5)]] for _ in range(9)]
        trace = trace_of(tokens, num_experts=5)
        best = {(): 0}  # what is held: hits so far
        for ((wanted,),) in tokens:
            after: dict[tuple[int, ...], int] = {}
            for held, found in best.items():
                found += wanted in held
                pool = set(held) | {wanted}
                for size in range(3):
                    for kept in itertools.combinations(sorted(pool), size):
                        if bypass or wanted in kept:
                            after[kept] = max(after.get(kept, 0), found)
            best = after
        steps = one_by_one(trace.requests)
        policy = BeladyPolicy(ExpertNumbers(trace.experts_per_layer), all_uses(trace, steps))
        rules = Rules(2 / 5, bypass=bypass, keep_used=not bypass)
        assert hits(trace, policy, rules) == max(best.values()), seed


def test_score_holds_on_where_lru_loses_everything() -> None:
    """A cycle one longer than the slots: LRU never hits, the model learns that all come equally
    late and keeps what it has."""
    trace = trace_of([[[t % 5]] for t in range(400)], num_experts=5)
    numbers = ExpertNumbers(trace.experts_per_layer)
    assert hits(trace, LruPolicy(numbers), Rules(0.8)) == 0
    assert hits(trace, ScorePolicy(numbers), Rules(0.8)) > 200


def test_reuse_model_learns_what_follows_from_what() -> None:
    """Expert 0 of the second layer comes one use after expert 1 of the first."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    model = ReuseModel(ExpertNumbers({0: 2, 1: 2}))
    sign = 0
    values: dict[int, list[float]] = {0: [], 1: []}
    for token in range(3000):
        now = sign
        sign = rng.randrange(2)
        for layer, expert in ((0, sign), (1, 1 - now)):
            rows = np.zeros(2, np.int32)
            rows[expert] = 1
            model.learn(LayerUse(layer, rows, rows.astype(np.float32)))
        if token > 2000:
            values[sign].append(float(np.exp(model.log_value[2])))
    soon, late = np.mean(values[1]), np.mean(values[0])
    assert soon > GAMMA - 0.1, f"seed {seed}: {soon} although it comes next"
    # without it: gamma squared at best, then half as likely each time
    assert late < soon - 0.15, f"seed {seed}: {late} although it does not come next"


def test_reuse_values_are_finite_probabilities_whatever_is_asked() -> None:
    seed = random.randrange(2**32)
    rng = np.random.default_rng(seed)
    numbers = ExpertNumbers({0: 3, 5: 7, 6: 4})
    policy = ScorePolicy(numbers)
    for _ in range(500):
        layer = int(rng.choice(numbers.layers))
        rows = rng.integers(0, 3, numbers.sizes[numbers.rank_of[layer]]).astype(np.int32)
        weights = (rows * rng.choice([0.0, 1e-6, 1.0, 1e4])).astype(np.float32)
        policy.observed(LayerUse(layer, rows, weights))
        if rng.random() < 0.3:
            policy.expected(layer, rng.integers(0, 2, len(rows)).astype(np.float32))
        worth = policy.worth(np.arange(numbers.total))
        assert np.isfinite(worth).all(), seed
        assert (worth <= 0).all(), seed


def test_expectations_count_until_the_layer_is_used() -> None:
    numbers = ExpertNumbers(EXPERTS)
    policy = ScorePolicy(numbers)
    for _ in range(30):
        for layer in EXPERTS:
            policy.observed(use_of(layer, [0]))
    span = np.arange(4, 10)
    assert policy.victims(span, 6)[-1] == 4
    policy.expected(3, np.array([0, 0, 0, 1, 0, 0], np.float32))
    assert policy.victims(span, 6)[-1] == 7
    policy.observed(use_of(3, [0]))
    assert policy.victims(span, 6)[-1] == 4


def test_what_is_learnt_late_of_an_older_use_does_not_hide_an_expectation() -> None:
    policy, chores = ScorePolicy(ExpertNumbers(EXPERTS)), Chores(most=1000)
    for _ in range(30):
        for layer in EXPERTS:
            policy.observed(use_of(layer, [0]))
    policy.put_off = chores.put_off
    for layer in EXPERTS:
        policy.observed(use_of(layer, [0]))
    span = np.arange(4, 10)
    policy.expected(3, np.array([0, 0, 0, 1, 0, 0], np.float32))
    for _ in range(2):
        assert policy.victims(span, 6)[-1] == 7
        chores.do_while(lambda: True)
    policy.observed(use_of(3, [0]))
    chores.do_while(lambda: True)
    assert policy.victims(span, 6)[-1] == 4


def test_score_takes_in_by_choice_only_what_is_worth_more() -> None:
    numbers = ExpertNumbers(EXPERTS)
    policy = ScorePolicy(numbers)
    for _ in range(50):
        policy.observed(use_of(1, [0, 1]))
    held = np.array([0, 1])
    assert policy.victims(held, 1, np.array([3])) == []
    assert len(policy.victims(np.array([2, 3]), 2, np.array([0, 1]))) == 2
    assert len(policy.victims(held, 1)) == 1, "needed now, so it is not asked"


def test_a_large_model_looks_at_fewer_layers() -> None:
    model = ReuseModel(ExpertNumbers(dict.fromkeys(range(40), 160)))
    count = model.num_context_layers
    assert 2 < count < 40
    for rank, numbers in enumerate(model._context):
        assert {int(number) // 160 for number in numbers} == {(rank - b) % 40 for b in range(count)}
        assert len(model._weights[rank]) == len(numbers) == 160 * count
    rows = np.zeros(160, np.int32)
    rows[:8] = 1
    for layer in (*range(40), *range(40)):
        model.learn(LayerUse(layer, rows, rows.astype(np.float32)))
    assert np.isfinite(model.log_value).all()


def test_unknown_policy() -> None:
    with pytest.raises(ConfigError, match="policy: 'lur' is unknown; there are resident, lru"):
        build_policy("lur", EXPERTS)
    assert [build_policy(name, EXPERTS).name for name in POLICIES] == list(POLICIES)


def test_router_weights_of_all_rows_count() -> None:
    """uses_of sums what every row of the batch gives an expert."""
    trace = topical_trace(random.randrange(2**32), num_tokens=20)
    use = uses_of(trace, np.arange(20))[1]
    assert use.layer == trace.layers[1]
    for e in range(trace.num_experts):
        chosen = trace.ids[:, 1] == e
        assert use.rows[e] == chosen.sum()
        assert use.weights[e] == pytest.approx(trace.weights[:, 1][chosen].sum(), rel=1e-5)
