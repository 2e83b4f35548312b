"""Kv and experts share one budget: the same bits whatever it is, and never more memory than it."""

from __future__ import annotations

import mmap
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_answers import answers, make_engine
from support.randomness import fresh_seed

from moeserve.config import (
    EngineConfig,
    ExpertConfig,
    KvConfig,
    ModelConfig,
    SchedulerConfig,
)
from moeserve.core import ConfigError, EngineRequest, SamplingParams
from moeserve.engine.engine import Engine
from moeserve.engine.host_memory import IDLE_SHARE, HostMemory, KvSizes

NUM_BLOCKS = 200
BLOCK_TOKENS = 4


def sharing_engine(
    packed: Path, budget_bytes: int, kv: KvConfig | None = None, **experts: object
) -> Engine:
    return Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(packed)),
            kv=kv or KvConfig(num_blocks=NUM_BLOCKS, block_tokens=BLOCK_TOKENS),
            scheduler=SchedulerConfig(max_batch_tokens=64),
            experts=ExpertConfig(
                cpu_backend="native",
                num_threads=2,
                host_memory_bytes=budget_bytes,
                **experts,  # type: ignore[arg-type]
            ),
        )
    )


def least_budget(packed: Path) -> tuple[int, int]:
    """With room for all kv and two experts; and the size of a slot."""
    with pytest.raises(ConfigError, match=r"kv up to \d+, and 2 experts \d+: at least") as refused:
        sharing_engine(packed, 4 << 20)
    words = str(refused.value).replace(":", " ").replace(",", " ").split()
    least, slots = int(words[words.index("least") + 1]), int(words[words.index("experts") + 1])
    return least, slots // 2


def make_crowd(rng: random.Random, vocab_size: int, count: int) -> list[EngineRequest]:
    """Some share prefixes, and all together take most of the kv."""
    prefix = [rng.randrange(vocab_size) for _ in range(rng.randint(8, 24))]
    return [
        EngineRequest(
            request_id=f"r{number}",
            token_ids=prefix * rng.randint(0, 1)
            + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 40))],
            params=SamplingParams(
                max_tokens=rng.randint(2, 40), temperature=0, ignore_eos=True, logprobs=0
            ),
        )
        for number in range(count)
    ]


def check_division(engine: Engine) -> None:
    """Between two steps, what is taken is what was given, and no more than there is."""
    division = engine.stats().memory
    assert division is not None
    [cache], _ = engine.loaded.runtime.supply.stats()
    assert division.experts_bytes == cache.num_slots * cache.slot_bytes
    assert division.kv_bytes == engine.kv_bytes <= division.kv_limit_bytes
    in_use = cache.num_used * cache.slot_bytes + division.kv_bytes + division.weights_bytes
    assert in_use <= division.budget_bytes
    engine.check_integrity()


@pytest.mark.parametrize("kv", [KvConfig(), KvConfig(block_tokens=1), KvConfig(num_blocks=9)])
@pytest.mark.parametrize("min_host_slots", [2, 7])
def test_the_least_that_is_named_works(min_host_slots: int, kv: KvConfig, packed: Path) -> None:
    """Whatever was asked for first: less than an expert, than two, than the weights, or than kv
    leaves; also where kv has by default what half of the budget would give it."""
    rng = random.Random(fresh_seed())
    _, slot_bytes = least_budget(packed)
    named = set()
    for asked in (1, rng.randint(slot_bytes, 2 * slot_bytes), rng.randint(1 << 17, 1 << 20)):
        with pytest.raises(ConfigError, match=r"at least \d+") as refused:
            sharing_engine(packed, asked, kv, min_host_slots=min_host_slots)
        named.add(int(str(refused.value).split("at least ")[1].split()[0]))
    [least] = named
    engine = sharing_engine(packed, least, kv, min_host_slots=min_host_slots)
    try:
        assert engine.loaded.runtime.cache.num_slots >= min_host_slots
    finally:
        engine.close()
    with pytest.raises(ConfigError, match=f"at least {least}"):
        sharing_engine(packed, least - 1, kv, min_host_slots=min_host_slots)


@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_same_bits_whatever_the_budget(prefix_reuse: bool, packed: Path, resident: Engine) -> None:
    rng = random.Random(fresh_seed())
    least, slot_bytes = least_budget(packed)
    requests = make_crowd(rng, resident.info.vocab_size, 14)
    expected = answers(resident, requests)
    kv = KvConfig(num_blocks=NUM_BLOCKS, block_tokens=BLOCK_TOKENS, prefix_reuse=prefix_reuse)
    engine = sharing_engine(packed, least + rng.randint(0, 30) * slot_bytes, kv, predictor="markov")
    total = engine.loaded.runtime.num_experts
    moved: list[tuple[int, int]] = []
    move = engine.runner.kv.move
    engine.runner.kv.move = lambda moves: (moved.extend(moves), move(moves))[1]  # type: ignore[method-assign]
    slots: list[int] = []

    def between() -> None:
        check_division(engine)
        slots.append(engine.loaded.runtime.cache.num_slots)
        # Once there is least: of what small requests leave, all experts might have room otherwise.
        if len(slots) == 2 or rng.random() < 0.1:
            more = 0 if len(slots) == 2 else rng.randint(0, total // 2)
            engine.resize_host_memory(least + more * slot_bytes)
            check_division(engine)

    try:
        assert answers(engine, requests, between) == expected
        division = engine.stats().memory
        assert division is not None
        assert division.num_kv_grown > 0
        assert division.num_kv_shrunk > 0
        assert min(slots) < max(slots) <= total
        assert answers(engine, requests, between) == expected
        assert moved or prefix_reuse
        if not prefix_reuse:
            assert engine.blocks.extent <= 4 or engine.loaded.runtime.cache.num_slots == total
    finally:
        engine.close()


def test_all_kv_can_be_had_at_the_least_budget(packed: Path, resident: Engine) -> None:
    """One request that needs the whole pool runs beside two experts, and nothing is preempted."""
    rng = random.Random(fresh_seed())
    least, _ = least_budget(packed)
    prompt = [rng.randrange(resident.info.vocab_size) for _ in range(NUM_BLOCKS * BLOCK_TOKENS - 5)]
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=0)
    request = EngineRequest(request_id="r", token_ids=prompt, params=params)
    expected = answers(resident, [request])
    engine = sharing_engine(packed, least)
    try:
        assert answers(engine, [request], lambda: check_division(engine)) == expected
        assert engine.stats().num_preemptions == 0
        assert engine.loaded.runtime.cache.num_slots > 2, "given back"
        with pytest.raises(ConfigError, match=rf"at least {least}"):
            engine.resize_host_memory(least - 1)
        check_division(engine)
    finally:
        engine.close()


def test_memory_that_the_system_has_not_is_refused_and_nothing_changes(
    packed: Path, resident: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kv's stays kv's."""
    monkeypatch.setattr("moeserve.cache.tiers.host_slots.REGION_BYTES", 1)  # a region, one slot
    rng = random.Random(fresh_seed())
    whole = NUM_BLOCKS * BLOCK_TOKENS - 5
    request = EngineRequest(
        request_id="r",
        token_ids=[rng.randrange(resident.info.vocab_size) for _ in range(whole)],
        params=SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=0),
    )
    expected = answers(resident, [request])
    engine = make_engine(packed, host_slots=4)
    try:
        with no_more_addresses(), pytest.raises(ConfigError, match="the system has no"):
            engine.resize_host_memory(1 << 40)
        assert engine.stats().memory is None
        assert answers(engine, [request]) == expected
        engine.resize_host_memory(1 << 40)
        assert engine.loaded.runtime.cache.num_slots == engine.loaded.runtime.num_experts
        assert answers(engine, [request]) == expected
    finally:
        engine.close()


@contextmanager
def no_more_addresses() -> Iterator[None]:
    """This process can map a quarter of a MiB and no more."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (taken + (256 << 10), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_experts_keep_what_they_are_promised(packed: Path) -> None:
    least, slot_bytes = least_budget(packed)
    with pytest.raises(ConfigError, match=rf"20 experts \d+: at least {least + 18 * slot_bytes}"):
        sharing_engine(packed, least + 17 * slot_bytes, min_host_slots=20)
    engine = sharing_engine(packed, least + 18 * slot_bytes, min_host_slots=20)
    engine.memory.grow(NUM_BLOCKS, NUM_BLOCKS)
    assert engine.loaded.runtime.cache.num_slots == 20
    engine.close()


def test_by_default_kv_may_take_half(packed: Path) -> None:
    engine = sharing_engine(packed, 16 << 20, KvConfig())
    half = ((16 << 20) - engine.loaded.resident_bytes) // 2
    assert half - engine.memory.sizes.block_bytes < engine.memory.limit_bytes <= half
    engine.close()


def test_a_fixed_number_of_slots_shares_nothing(packed: Path) -> None:
    engine = make_engine(packed, host_slots=10)
    assert engine.blocks.extent == engine.blocks.num_blocks
    assert engine.stats().memory is None
    engine.close()


class Experts:
    """Of the size of a tier, and which sizes it was given."""

    def __init__(self, slot_bytes: int, num_experts: int) -> None:
        self.host_slot_bytes, self.num_experts = slot_bytes, num_experts
        self.num_misses = 0
        self.num_slots = 0

    def reserve_host_memory(self, num_bytes: int) -> None:
        """There is as much as anybody wants."""

    def resize_host_memory(self, num_bytes: int) -> None:
        self.num_slots = min(num_bytes // self.host_slot_bytes, self.num_experts)

    def settle_host_memory(self) -> None:
        """Nothing is under way."""


@settings(max_examples=200)
@given(data=st.data())
def test_memory_goes_to_and_fro_within_the_budget(data: st.DataObject) -> None:
    draw = data.draw
    sizes = KvSizes(draw(st.integers(1, 60)), draw(st.integers(1, 9)), draw(st.integers(1, 5)))
    experts = Experts(draw(st.integers(1, 40)), draw(st.integers(2, 30)))
    weights, least_slots = draw(st.integers(0, 99)), draw(st.integers(2, 5))
    memory = HostMemory(experts, weights, sizes, least_slots, shares=draw(st.booleans()))
    least = weights + sizes.num_blocks * sizes.block_bytes + least_slots * experts.host_slot_bytes
    with pytest.raises(ConfigError, match=f"at least {least}"):
        memory.set_budget(least - 1)
    held = idle = 0

    def check() -> None:
        assert held + idle <= memory.extent <= sizes.num_blocks
        assert experts.num_slots >= min(least_slots, experts.num_experts)
        kv_bytes = memory.extent * sizes.block_bytes
        taken = weights + kv_bytes + experts.num_slots * experts.host_slot_bytes
        assert taken <= memory.budget_bytes

    memory.set_budget(least + draw(st.integers(0, 300)))
    memory.shrink(memory.extent)
    for _ in range(draw(st.integers(1, 12))):
        check()
        held = draw(st.integers(0, sizes.num_blocks))
        before = memory.extent
        if held + idle > before:
            memory.grow(held, min(held + idle, sizes.num_blocks))
            assert memory.extent >= max(before, held)
            idle = min(idle, memory.extent - held)
            check()
        idle = draw(st.integers(0, memory.extent - held))
        experts.num_misses += draw(st.integers(0, 1))
        extent = memory.fitting_extent(held, idle)
        assert held <= extent <= memory.extent
        if extent < memory.extent:
            assert extent % sizes.page_blocks == 0
            idle = min(idle, extent - held)
            memory.shrink(extent)
        check()


def test_idle_blocks_leave_when_experts_are_missed() -> None:
    sizes = KvSizes(num_blocks=100, block_bytes=10, page_blocks=1)
    experts = Experts(slot_bytes=10, num_experts=1000)
    memory = HostMemory(experts, 0, sizes, 2)
    memory.set_budget(1200)
    assert memory.fitting_extent(0, 90) == 91, "no expert was missed"
    experts.num_misses += 1
    kept = int(IDLE_SHARE * 1200) // 10
    assert memory.fitting_extent(0, 90) == kept + 1
    assert memory.fitting_extent(50, 40) == 91, "nor since"
    memory = HostMemory(Experts(slot_bytes=10, num_experts=3), 0, replace(sizes), 2)
    memory.set_budget(1200)
    assert memory.fitting_extent(0, 0) == 100, "all experts have room beside all kv"
