"""What an engine counts of its experts, against counts of its routing."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from support.engine_answers import answers, make_engine, make_requests
from support.randomness import fresh_seed

from moeserve.core import ConfigError, ExpertKey, Routing
from moeserve.engine import engine as engine_room
from moeserve.experts import use_counts
from moeserve.experts.use_counts import UseCounts


def test_counters_are_those_of_the_routing(packed: Path) -> None:
    rng = random.Random(fresh_seed())
    engine = make_engine(packed, host_slots=rng.randint(8, 60), policy="lru", predictor="markov")
    uses: Counter[int] = Counter()  # per step and expert, by layer
    wanted: set[ExpertKey] = set()

    def count(layer: int, x: torch.Tensor, routing: Routing) -> None:
        chosen = np.unique(routing.ids.numpy()).tolist()
        uses[layer] += len(chosen)
        wanted.update(ExpertKey(layer, expert) for expert in chosen)

    engine.loaded.runtime.observers.append(count)
    try:
        answers(engine, make_requests(rng, engine.info.vocab_size))
        stats = engine.stats(fresh=True).experts
        assert stats is not None
        [cache], [link] = stats.caches, stats.links
        for place, layer in enumerate(stats.layers):
            found = cache.hits[place] + cache.late[place] + cache.misses[place]
            assert found == uses[layer]
            begun = cache.prefetches_begun[place]
            assert cache.prefetches_useful[place] + cache.prefetches_wasted[place] <= begun
        assert cache.num_used <= cache.num_slots
        for place, layer in enumerate(stats.layers):
            first_uses = sum(key.layer == layer for key in wanted)
            num_bytes = link.demand_bytes[place] + link.prefetch_bytes[place]
            assert num_bytes >= first_uses * 20_000, "every expert was absent at first"
            assert stats.cpu_busy_s[place] > 0
        assert sum(stats.cpu_busy_s) < engine.stats().step_s
        assert engine.stats().kv_bytes == engine.kv_bytes > 0
    finally:
        engine.close()


def test_experts_are_looked_at_once_per_second(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(fresh_seed())
    engine = make_engine(packed, host_slots=20)
    monkeypatch.setattr(engine_room, "EXPERT_STATS_S", 1e6)
    try:
        for request in make_requests(rng, engine.info.vocab_size):
            engine.add(request)
        engine.step()
        first = engine.stats()
        engine.step()
        assert engine.has_work
        second = engine.stats()
        assert second.num_steps == first.num_steps + 1
        assert second.experts is first.experts
        assert engine.stats(fresh=True).experts is not first.experts
        while engine.has_work:
            engine.step()
        idle = engine.stats().experts
        assert idle is not None
        fresh = engine.loaded.runtime.stats()
        assert idle.caches[0].hits == fresh.caches[0].hits, "the last steps are in it"
    finally:
        engine.close()


def test_a_resident_model_has_times_and_nothing_to_resize(packed: Path) -> None:
    rng = random.Random(fresh_seed())
    engine = make_engine(packed)
    try:
        answers(engine, make_requests(rng, engine.info.vocab_size))
        stats = engine.stats().experts
        assert stats is not None
        assert stats.caches == stats.links == []
        assert min(stats.cpu_busy_s) > 0
        with pytest.raises(ConfigError, match="all experts are resident") as refused:
            engine.resize_host_memory(1 << 40)
        assert "moeserve pack" in str(refused.value)
    finally:
        engine.close()


def test_uses_are_counted_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed := fresh_seed())
    torch.manual_seed(seed)
    monkeypatch.setattr(use_counts, "MAX_WAITING", int(rng.integers(1, 20)))
    monkeypatch.setattr(use_counts, "MAX_WAITING_ROWS", int(rng.integers(1, 200)))
    sizes = {5: 8, 1: 3, 9: 130}
    counts = UseCounts(sizes)
    expected = {layer: np.zeros(size, np.int64) for layer, size in sizes.items()}
    for _ in range(100):
        layer = int(rng.choice(list(sizes)))
        ids = rng.integers(0, sizes[layer], (int(rng.integers(1, 9)), 2))
        for expert in ids.ravel():
            expected[layer][expert] += 1
        routing = Routing(torch.from_numpy(ids), torch.rand(ids.shape))
        counts(layer, torch.empty(len(ids), 4), routing)
        if rng.random() < 0.1:
            counts.by_layer()
    found = counts.by_layer()
    assert list(found) == [1, 5, 9]
    for layer, of_layer in expected.items():
        np.testing.assert_array_equal(found[layer], of_layer)
