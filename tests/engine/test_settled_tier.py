"""A tier that has come to hold everything: layers in one call, and books that still agree."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import torch
from support.engine_answers import answers, make_engine, make_requests
from support.randomness import fresh_seed

from moeserve.core import EngineRequest, ExpertKey, Routing
from moeserve.engine.engine import Engine
from moeserve.experts.disk_supply import DiskSupply
from moeserve.experts.layer import MoELayer
from moeserve.models.native_layer import CountedExperts
from moeserve.models.transformer import MoeFfn


def make_tiered(packed_int8: Path) -> Engine:
    """A slot for every expert, and all of them brought on a guess."""
    probe = make_engine(packed_int8, host_slots=2)
    total = probe.loaded.runtime.cache.numbers.total
    probe.close()
    engine = make_engine(packed_int8, host_slots=total, policy="lru", predictor="gate_lookahead")
    fill(engine)
    return engine


def fill(engine: Engine) -> None:
    supply = engine.loaded.runtime.supply
    assert isinstance(supply, DiskSupply)
    numbers = supply.cache.numbers
    keys = [ExpertKey(layer, e) for layer in numbers.layers for e in range(numbers.sizes[0])]
    supply.begin_prefetch(supply.cache.prefetch(keys))
    while supply.transfers.num_active:
        for arrival in supply.transfers.wait(numbers.layers[0]):
            supply._take(arrival)
    supply.collect()


def layers_of(engine: Engine) -> list[MoELayer]:
    return [x.ffn.routed for x in engine.loaded.model.layers if isinstance(x.ffn, MoeFfn)]


def test_a_settled_tier_counts_what_its_layers_use(packed_int8: Path) -> None:
    rng = random.Random(fresh_seed())
    requests: list[EngineRequest] = []
    counts, found = [], []
    wanted: dict[int, set[int]] = defaultdict(set)

    def observe(layer: int, x: torch.Tensor, routing: Routing) -> None:
        wanted[layer].update(routing.ids.flatten().tolist())

    for observers in ([], [observe]):  # in one call, and in parts, since somebody looks
        engine = make_tiered(packed_int8)
        requests = requests or make_requests(rng, engine.info.vocab_size)
        cache = engine.loaded.runtime.cache
        engine.loaded.runtime.observers.extend(observers)
        assert all(layer.is_whole != bool(observers) for layer in layers_of(engine))
        fused = [layer.fused.ffn for layer in engine.loaded.model.layers]
        assert all(isinstance(each, CountedExperts) for each in fused)
        found.append(answers(engine, requests))
        counts.append(cache.counters.by_layer(cache.numbers))
        engine.close()
    assert found[0] == found[1]
    assert counts[0] == counts[1]
    for layer, count in counts[0].items():
        assert count["hits"] > count["misses"] == count["late"] == 0
        assert count["prefetches_useful"] == len(wanted[layer])


def test_a_tier_made_smaller_runs_in_parts_again(packed_int8: Path) -> None:
    rng = random.Random(fresh_seed())
    tiered = make_tiered(packed_int8)
    requests = make_requests(rng, tiered.info.vocab_size)
    first = answers(tiered, requests)
    supply = tiered.loaded.runtime.supply
    assert isinstance(supply, DiskSupply)
    supply.resize(supply.cache.num_slots // 2)
    assert not any(layer.is_whole for layer in layers_of(tiered))
    assert answers(tiered, requests) == first
    assert supply.cache.counters.totals()["misses"] > 0
    tiered.close()
