"""Grouped decodes: fewer experts per step, nobody forgotten, the same tokens."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from fake_model import EOS, FakeModel, expected_output, request
from support.randomness import fresh_generators

from moeserve.config import SchedulerConfig
from moeserve.core import ConfigError
from moeserve.engine.decode_groups import DecodeGroups, union_size
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.request_scheduler import RequestScheduler
from moeserve.engine.sequence import Sequence

Experts = dict[Sequence, int]


def sequences(count: int, first: int = 0, **more: object) -> list[Sequence]:
    numbers = range(first, first + count)
    return [Sequence(request(f"r{i}", [1, 2], 100, **more), i, 0.0) for i in numbers]


def clustered(rng: random.Random, ready: list[Sequence], clusters: int) -> Experts:
    """Sequences of one cluster want mostly the same experts of 64."""
    bases = [rng.sample(range(64), 12) for _ in range(clusters)]
    experts = {}
    for sequence in ready:
        chosen = rng.sample(rng.choice(bases), 8) + rng.sample(range(64), 1)
        experts[sequence] = sum(1 << e for e in set(chosen))
    return experts


def groups_of(experts: Experts, size: int, wait: int) -> DecodeGroups:
    return DecodeGroups(size, wait, lambda ready: [experts[s] for s in ready])


def test_like_routing_runs_together() -> None:
    ready = sequences(8)
    experts = {s: 0b1111 if i % 2 else 0b11110000 for i, s in enumerate(ready)}
    groups = groups_of(experts, 4, 4)
    first = groups.choose(ready, 0.0)
    assert union_size(first, experts) == 4
    assert union_size(groups.choose(ready, 1.0), experts) == 4


def test_never_more_experts_than_the_longest_waiting_would_want() -> None:
    rng, _ = fresh_generators()
    saved = plain_total = best_total = 0
    for _ in range(1000):  # 72 % on average, give or take 1.2
        ready = sequences(rng.randint(5, 9))
        experts = clustered(rng, ready, 3)
        size = rng.randint(2, 4)
        chosen = groups_of(experts, size, 8).choose(ready, 0.0)
        assert len(set(chosen)) == size
        plain = union_size(ready[:size], experts)
        best = min(union_size(group, experts) for group in combinations(ready, size))
        assert best <= union_size(chosen, experts) <= plain
        saved += plain - union_size(chosen, experts)
        plain_total += plain
        best_total += plain - best
    assert saved > 0.65 * best_total, f"{saved} of {best_total} that could be saved"


def test_nobody_waits_longer_than_allowed() -> None:
    rng, _ = fresh_generators()
    for _ in range(40):
        size, wait, count = rng.randint(1, 5), rng.randint(0, 6), rng.randint(1, 20)
        ready = sequences(count)
        experts = clustered(rng, ready, 4)
        groups = groups_of(experts, size, wait)
        most = max(wait, -(-count // size) - 1)
        waited = dict.fromkeys(ready, 0)
        for step in range(60):
            chosen = set(groups.choose(ready, float(step)))
            assert len(chosen) == min(size, count)
            for sequence in ready:
                waited[sequence] = 0 if sequence in chosen else waited[sequence] + 1
            assert max(waited.values()) <= most


def test_nobody_waits_longer_than_allowed_when_sequences_come_and_go() -> None:
    rng, _ = fresh_generators()
    for _ in range(20):
        size, wait = rng.randint(1, 4), rng.randint(2, 6)
        ready = sequences(6)
        experts = clustered(rng, ready, 3)
        groups = groups_of(experts, size, wait)
        waited = dict.fromkeys(ready, 0)
        most_ready, made = len(ready), len(ready)
        for step in range(80):
            if rng.random() < 0.3 and len(ready) < 14:
                new = sequences(1, made)
                made += 1
                experts |= clustered(rng, new, 3)
                ready += new
                waited[new[0]] = 0
            if rng.random() < 0.2 and len(ready) > 2:
                waited.pop(ready.pop(rng.randrange(len(ready))))
            most_ready = max(most_ready, len(ready))
            chosen = set(groups.choose(ready, float(step)))
            for sequence in ready:
                waited[sequence] = 0 if sequence in chosen else waited[sequence] + 1
            assert max(waited.values()) <= max(wait, -(-most_ready // size) - 1)


def test_no_deadline_suffers() -> None:
    """Steps of a second, 100 tokens to go, 103 s: it must run in every step but three."""
    ready = sequences(5)
    hurried = Sequence(request("hurry", [1, 2], 100, deadline_s=103.0), 5, 0.0)
    ready.append(hurried)
    experts = dict.fromkeys(ready, 0b1) | {hurried: 0b11110}
    groups = groups_of(experts, 2, 50)
    for step in range(103):
        if hurried in groups.choose(ready, float(step)):
            hurried.token_ids.append(1)
    assert hurried.num_output_tokens >= 100


def test_more_run_than_a_group_has_room_for_where_their_deadlines_ask_for_it() -> None:
    """Three times as many as a group takes, and each must run in every step but three."""
    hurried = [Sequence(request(f"h{i}", [1, 2], 100, deadline_s=103.0), i, 0.0) for i in range(6)]
    others = sequences(5, first=6)
    experts = {s: 1 << i for i, s in enumerate(hurried)} | dict.fromkeys(others, 1 << 9)
    groups = groups_of(experts, 2, 50)
    for step in range(103):
        left = [s for s in hurried if s.num_output_tokens < 100]
        for sequence in groups.choose([*left, *others], float(step)):
            sequence.token_ids.append(1)
    assert all(sequence.num_output_tokens >= 100 for sequence in hurried)


def test_everybody_runs_where_everybody_fits() -> None:
    ready = sequences(4)
    groups = DecodeGroups(4, 0, lambda _: pytest.fail("nothing to be predicted"))
    assert groups.choose(ready, 0.0) == ready


@pytest.mark.parametrize("num_blocks", [16, 60])
def test_a_real_scheduler_gives_the_same_tokens(num_blocks: int) -> None:
    """With kv for all, and with so little that sequences give way to each other."""
    rng, _ = fresh_generators()
    blocks = BlockManager(num_blocks, 2, True)
    config = SchedulerConfig(
        decode_group=2, decode_wait_steps=3, max_running=7, admission="aggressive"
    )
    asked = [
        request(f"r{i}", [rng.randint(1, 4) for _ in range(rng.randint(1, 6))], rng.randint(1, 12))
        for i in range(20)
    ]
    experts = {each.request_id: sum(1 << e for e in rng.sample(range(16), 4)) for each in asked}
    scheduler = RequestScheduler(
        config,
        blocks,
        [EOS],
        24,
        predicted_experts=lambda ready: [experts[s.request_id] for s in ready],
    )
    model = FakeModel(num_blocks, 2)
    outputs: dict[str, list[int]] = {each.request_id: [] for each in asked}
    for each in asked:
        scheduler.add(each, 0.0)
    step = 0
    while scheduler.has_work:
        step += 1
        assert step < 2000, "no progress"
        decoding = {s for s in scheduler._running if s.num_tokens_to_compute == 1}
        batch = scheduler.schedule(float(step))
        scheduler.check_integrity()
        assert batch is not None
        assert sum(chunk.sequence in decoding for chunk in batch.chunks) <= 2
        for delta in scheduler.commit(batch, model.run(batch), float(step)):
            outputs[delta.request_id] += delta.token_ids
        scheduler.check_integrity()
    assert outputs == {each.request_id: expected_output(each) for each in asked}
    assert blocks.num_held == 0


def test_grouping_without_predictions_is_refused_by_name() -> None:
    config = SchedulerConfig(decode_group=4)
    with pytest.raises(ConfigError, match=r"decode_group: 4 decodes .* nothing predicts"):
        RequestScheduler(config, BlockManager(8, 2, True), [EOS], 24)
    with pytest.raises(ConfigError, match="decode_group"):
        SchedulerConfig(decode_group=0)
    with pytest.raises(ConfigError, match="decode_wait_steps"):
        SchedulerConfig(decode_wait_steps=-1)
