"""Admission rules against brute force: sorted lists, and kv counted token by token."""

from __future__ import annotations

import random
from itertools import count

import pytest
from fake_model import request
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.config import SchedulerConfig
from moeserve.engine.admission import (
    Aggressive,
    Conservative,
    OutputLengths,
    PastFuture,
    make_admission,
)
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.sequence import Sequence

LONGEST = 50


@given(
    lengths=st.lists(st.integers(1, 40), max_size=30),
    size=st.integers(1, 10),
    fraction=st.floats(0, 1, exclude_max=True),
    more_than=st.integers(0, 45),
)
def test_quantiles_are_those_of_the_recent_lengths(
    lengths: list[int], size: int, fraction: float, more_than: int
) -> None:
    known = OutputLengths(size)
    for length in lengths:
        known.add(length)
    possible = [n for n in sorted(lengths[-size:]) if n > more_than] + [LONGEST]
    expected = possible[int(fraction * len(possible))]
    assert known.quantile(fraction, more_than, LONGEST) == expected


def test_quantiles_never_exceed_what_the_request_allows() -> None:
    known = OutputLengths(10)
    for _ in range(10):
        known.add(30)
    assert {known.quantile(u / 10, 0, 20) for u in range(10)} == {20}


class Pool:
    """Sequences put into a pool by hand, some with outputs, some with common prefixes."""

    def __init__(self, rng: random.Random, num_running: int, history: PastFuture) -> None:
        self.history = history
        self.blocks = BlockManager(2000, rng.randint(1, 4), prefix_reuse=True)
        arrivals = count(rng.randint(0, 1000))
        self.running = [self._sequence(rng, next(arrivals)) for _ in range(num_running)]
        for sequence in self.running:
            self._match(sequence)
            self.blocks.claim(sequence.table)
            assert self.blocks.extend(sequence.table, sequence.num_tokens)
            done = sequence.num_tokens - 1
            self.blocks.publish(sequence.table, sequence.token_ids, done)
        self.candidate = self._sequence(rng, next(arrivals))
        self._match(self.candidate)

    def _match(self, sequence: Sequence) -> None:
        self.blocks.match(sequence.table, sequence.token_ids, sequence.num_reusable_tokens)

    @staticmethod
    def _sequence(rng: random.Random, arrival: int) -> Sequence:
        common = [1] * rng.randint(0, 12)
        own = [rng.randint(1, 2) for _ in range(rng.randint(1, 10))]
        sequence = Sequence(request(str(arrival), common + own, LONGEST), arrival, 0.0)
        sequence.token_ids += [rng.randint(1, 2) for _ in range(rng.randint(0, 20))]
        return sequence

    def true_peak(self) -> int:
        """Most blocks in use, were all predictions right and all decoded in step."""
        everyone = [*self.running, self.candidate]
        left = [self.history._remaining(sequence) for sequence in everyone]
        size = self.blocks.block_tokens
        peak = 0
        for step in range(max(left) + 1):
            used: set[object] = set()
            for index, (sequence, tokens) in enumerate(zip(everyone, left, strict=True)):
                if tokens < step:
                    continue
                blocks = self.blocks.blocks_for(sequence.num_tokens + step)
                shared = len(sequence.table.path)
                used.update(tuple(sequence.token_ids[: (i + 1) * size]) for i in range(shared))
                used.update(("own", index, i) for i in range(shared, blocks))
            peak = max(peak, len(used))
        return peak

    def shared_blocks(self) -> int:
        tables = [sequence.table for sequence in self.running]
        return self.blocks.split_shared(tables, self.candidate.table, 0)[0]


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**32), num_running=st.integers(0, 8), known=st.integers(0, 30))
def test_predicted_peak_is_above_the_true_one_and_close(
    seed: int, num_running: int, known: int
) -> None:
    rng = random.Random(seed)
    policy = PastFuture(100)
    for _ in range(known):
        policy.observe(rng.randint(1, LONGEST))
    pool = Pool(rng, num_running, policy)
    true = pool.true_peak()
    predicted = policy.peak_blocks(pool.candidate, pool.running, pool.blocks)
    # A spare block each; each growth is rounded up to a block; shared blocks are held to the end.
    assert true < predicted <= true + 2 * (num_running + 1) + pool.shared_blocks()


def _alone(num_blocks: int, prompt: int, max_tokens: int) -> tuple[Sequence, BlockManager]:
    sequence = Sequence(request("x", [1] * prompt, max_tokens), 0, 0.0)
    return sequence, BlockManager(num_blocks, 1, prefix_reuse=True)


def test_with_no_history_past_future_expects_max_tokens() -> None:
    sequence, blocks = _alone(100, 10, 40)
    assert PastFuture(10).peak_blocks(sequence, [], blocks) == 10 + 39 + 1


def test_with_history_past_future_expects_what_outputs_were() -> None:
    sequence, blocks = _alone(100, 10, 40)
    policy = PastFuture(100)
    for _ in range(100):
        policy.observe(5)
    assert policy.peak_blocks(sequence, [], blocks) == 10 + 4 + 1


@pytest.mark.parametrize(
    ("policy", "fits"), [(Aggressive(0.0), 10), (Aggressive(0.5), 20), (Conservative(), 49)]
)
def test_each_rule_asks_for_its_own_room(policy: Aggressive | Conservative, fits: int) -> None:
    for num_blocks in range(10, 60):
        sequence, blocks = _alone(num_blocks, 10, 40)
        if policy.admits(sequence, [], blocks):
            break
    assert num_blocks in (fits, fits - 1)  # a share of an odd pool rounds down


def test_config_names_the_policies() -> None:
    kinds = {"past_future": PastFuture, "aggressive": Aggressive, "conservative": Conservative}
    for name, kind in kinds.items():
        assert isinstance(make_admission(SchedulerConfig(admission=name)), kind)
