"""Admission rules against brute force: lists of lengths, kv block by block, all cases in turn."""

from __future__ import annotations

import random
from collections import Counter
from itertools import compress, count, product
from math import prod, sqrt

import numpy as np
import pytest
from fake_model import request
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.config import SchedulerConfig
from moeserve.engine.admission import (
    Aggressive,
    Conservative,
    make_admission,
)
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.past_future import RISK_DEVIATIONS, STEPS, OutputLengths, PastFuture
from moeserve.engine.sequence import Sequence

LONGEST = 50


@given(
    lengths=st.lists(st.integers(1, 40), max_size=30),
    size=st.integers(1, 10),
    done=st.lists(st.integers(0, 45), min_size=1, max_size=4),
    steps=st.lists(st.integers(0, 45), min_size=1, max_size=4),
    longest=st.integers(46, 60),
)
def test_chances_are_those_of_the_recent_lengths(
    lengths: list[int], size: int, done: list[int], steps: list[int], longest: int
) -> None:
    known = OutputLengths(size)
    for length in lengths:
        known.add(length)
    limits = np.full(len(done), longest)
    shares = known.going_on(np.array(done), np.array(steps), limits)
    for i, start in enumerate(done):
        for j, step in enumerate(steps):
            assert shares[i, j] == pytest.approx(chance(lengths[-size:], start, step, longest))


def chance(recent: list[int], done: int, steps: int, longest: int) -> float:
    """Of outputs as long as this one, the part that is longer by more than `steps`."""
    possible = [min(n, longest) for n in recent if n > done] + [longest]
    return sum(n > done + steps for n in possible) / len(possible)


def test_nothing_goes_on_beyond_what_the_request_allows() -> None:
    known = OutputLengths(10)
    for _ in range(10):
        known.add(30)
    shares = known.going_on(np.array([0, 15]), np.array([4, 5, 19, 20]), np.array([20, 20]))
    assert shares.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


class Pool:
    """Sequences put into a pool by hand, some with outputs, some with common prefixes."""

    def __init__(self, rng: random.Random, num_running: int) -> None:
        self.blocks = BlockManager(2000, rng.randint(1, 4), prefix_reuse=True)
        arrivals = count(rng.randint(0, 1000))
        self.running = [self._sequence(rng, next(arrivals)) for _ in range(num_running)]
        for sequence in self.running:
            self._match(sequence)
            self.blocks.claim(sequence.table)
            assert self.blocks.extend(sequence.table, sequence.num_tokens)
            done = sequence.num_tokens - 1
            self.blocks.publish(sequence.table, sequence.token_ids, done)
        self.candidates = [self._sequence(rng, next(arrivals)) for _ in range(rng.randint(1, 4))]
        for candidate in self.candidates:
            self._match(candidate)

    def _match(self, sequence: Sequence) -> None:
        self.blocks.match(sequence.table, sequence.token_ids, sequence.num_reusable_tokens)

    @staticmethod
    def _sequence(rng: random.Random, arrival: int) -> Sequence:
        common = [1] * rng.randint(0, 12)
        own = [rng.randint(1, 2) for _ in range(rng.randint(1, 10))]
        sequence = Sequence(request(str(arrival), common + own, LONGEST), arrival, 0.0)
        sequence.token_ids += [rng.randint(1, 2) for _ in range(rng.randint(0, 20))]
        return sequence

    def blocks_after(self, candidate: Sequence, steps: int) -> tuple[int, list[int]]:
        """Blocks that several hold now, and how many each holds alone after so many steps."""
        size = self.blocks.block_tokens
        names: list[list[object]] = []
        for index, sequence in enumerate([*self.running, candidate]):
            indexed = len(sequence.table.path)
            count = -(-(sequence.num_tokens + steps) // size)
            names.append([tuple(sequence.token_ids[: (i + 1) * size]) for i in range(indexed)])
            names[-1] += [("own", index, i) for i in range(indexed, count)]
        holders = Counter(name for own in names for name in own)
        shared = {name for name, num_holders in holders.items() if num_holders > 1}
        return len(shared), [sum(name not in shared for name in own) for own in names]

    def expected_peak(self, candidate: Sequence, recent: list[int]) -> float:
        """The rule's definition, by going through who may still run, one subset after another."""
        everyone = [*self.running, candidate]
        done = [sequence.num_output_tokens for sequence in everyone]
        last = max(LONGEST - d for d in done) - 1
        shared, own = self.blocks_after(candidate, 0)
        peak = float(sum(own))
        for steps in [*(int(s) for s in STEPS if s < last), last]:
            own = self.blocks_after(candidate, steps)[1]
            shares = [chance(recent, d, steps, LONGEST) for d in done]
            cases = []  # weight, use
            for alive in product((False, True), repeat=len(own)):
                weight = prod(p if on else 1 - p for p, on in zip(shares, alive, strict=True))
                cases.append((weight, sum(compress(own, alive))))
            mean = sum(weight * use for weight, use in cases)
            variance = sum(weight * (use - mean) ** 2 for weight, use in cases)
            most = max(use for weight, use in cases if weight > 0)
            peak = max(peak, min(most, mean + RISK_DEVIATIONS * sqrt(variance)))
        return shared + peak


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), num_running=st.integers(0, 4), known=st.integers(0, 30))
def test_the_predicted_peak_is_that_of_all_cases(seed: int, num_running: int, known: int) -> None:
    rng = random.Random(seed)
    policy = PastFuture(20)
    lengths = [rng.randint(1, LONGEST) for _ in range(known)]
    for length in lengths:
        policy.observe(length)
    pool = Pool(rng, num_running)
    predicted = policy.peak_blocks(pool.candidates, pool.running, pool.blocks)
    expected = [pool.expected_peak(candidate, lengths[-20:]) for candidate in pool.candidates]
    assert predicted.tolist() == pytest.approx(expected, rel=1e-9)
    first = next((c for c, p in zip(pool.candidates, predicted, strict=True) if p <= 40), None)
    pool.blocks.num_blocks = 40
    assert policy.choose(pool.candidates, pool.running, pool.blocks) is first


@pytest.mark.parametrize(("prompt", "output"), [((500, 3000), 30), ((100, 1000), 300)])
def test_kv_seldom_runs_out_where_the_predicted_peak_fits(
    prompt: tuple[int, int], output: int
) -> None:
    """Outputs drawn from the lengths that were observed; a pool as large as the peak."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    overflows = draws = 0
    needed_if_nobody_ends = predicted_in_all = 0.0
    for _ in range(20):
        lengths = [min(1 + int(rng.expovariate(1 / output)), 4095) for _ in range(500)]
        policy = PastFuture(500)
        for length in lengths:
            policy.observe(length)
        blocks = BlockManager(100_000, 16, prefix_reuse=False)
        everyone = []
        for arrival in range(rng.randint(8, 40)):
            ids = [arrival] * rng.randint(*prompt)
            everyone.append(Sequence(request(str(arrival), ids, 4096), arrival, 0.0))
            everyone[-1].token_ids += [1] * rng.choice([n for n in range(output) if n % 3 == 0])
            blocks.extend(everyone[-1].table, everyone[-1].num_tokens)
        blocks.release(everyone[-1].table)
        predicted = policy.peak_blocks(everyone[-1:], everyone[:-1], blocks)[0]
        tokens = np.array([s.num_tokens for s in everyone])[:, None]
        steps = np.arange(2 * output)
        held = -(-(tokens + steps) // 16)  # [S, H]
        predicted_in_all += predicted
        needed_if_nobody_ends += held[:, -1].sum()
        for _ in range(50):
            left = np.array([_drawn(rng, lengths, s.num_output_tokens) for s in everyone])
            use = (held * (steps < left[:, None])).sum(0)
            overflows += use.max() > predicted
            draws += 1
    assert overflows < 0.2 * draws
    assert predicted_in_all < needed_if_nobody_ends


def _drawn(rng: random.Random, lengths: list[int], done: int) -> int:
    return rng.choice([n for n in lengths if n > done]) - done


def _alone(num_blocks: int, prompt: int, max_tokens: int) -> tuple[Sequence, BlockManager]:
    sequence = Sequence(request("x", [1] * prompt, max_tokens), 0, 0.0)
    return sequence, BlockManager(num_blocks, 1, prefix_reuse=True)


def test_with_no_history_past_future_expects_max_tokens() -> None:
    sequence, blocks = _alone(100, 10, 40)
    assert PastFuture(10).peak_blocks([sequence], [], blocks) == 10 + 39


def test_with_history_past_future_expects_what_outputs_were() -> None:
    sequence, blocks = _alone(100, 10, 40)
    policy = PastFuture(100)
    for _ in range(100):
        policy.observe(5)
    assert policy.peak_blocks([sequence], [], blocks) == 10 + 4


@pytest.mark.parametrize(
    ("policy", "fits"), [(Aggressive(0.0), 10), (Aggressive(0.5), 20), (Conservative(), 49)]
)
def test_each_rule_asks_for_its_own_room(policy: Aggressive | Conservative, fits: int) -> None:
    for num_blocks in range(10, 60):
        sequence, blocks = _alone(num_blocks, 10, 40)
        if policy.choose([sequence], [], blocks) is sequence:
            break
    assert num_blocks in (fits, fits - 1)  # a share of an odd pool rounds down


def test_config_names_the_policies() -> None:
    kinds = {"past_future": PastFuture, "aggressive": Aggressive, "conservative": Conservative}
    for name, kind in kinds.items():
        assert isinstance(make_admission(SchedulerConfig(admission=name)), kind)
