"""Experts on disk, in host memory and on an emulated device at once: the same bits whatever stands
where, and what happens when the disk fails."""

from __future__ import annotations

import itertools
import random
import re
import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.engine_answers import answers, make_engine, make_requests
from support.randomness import fresh_seed

from moeserve.cache.policies import registry
from moeserve.config import (
    EngineConfig,
    ExpertConfig,
    KvConfig,
    ModelConfig,
    SchedulerConfig,
)
from moeserve.core import ConfigError, ErrorCode, FinishReason
from moeserve.engine.engine import Engine
from moeserve.experts.device_supply import DeviceSupply
from moeserve.experts.host_over_disk import HostOverDisk
from moeserve.experts.schedule.profile_file import encode_profile, shipped_profile

POLICIES = sorted(set(registry.POLICIES) - {"resident"})
PREDICTORS = ("none", "frequency", "markov", "gate_lookahead", "gate_residual")


def tiers_of(engine: Engine) -> tuple[DeviceSupply, HostOverDisk]:
    supply = engine.loaded.runtime.supply
    assert isinstance(supply, DeviceSupply)
    assert isinstance(supply.host, HostOverDisk)
    return supply, supply.host


def pairs_of_slots(rng: random.Random, total: int) -> list[tuple[int, int]]:
    """Slots of (device, host): the least, more than there are experts, and between."""
    return [
        (1, 2),
        (rng.randint(1, total // 4), rng.randint(2, total // 4)),
        (rng.randint(1, total), rng.randint(2, total)),
        rng.choice([(total, 2), (1, total), (total, total)]),
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_same_bits_whatever_the_machinery(policy: str, packed: Path, resident: Engine) -> None:
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, resident.info.vocab_size)
    expected = answers(resident, requests)
    total = resident.loaded.runtime.cache.num_slots
    for device_slots, host_slots in pairs_of_slots(rng, total):
        predictor = rng.choice(PREDICTORS)
        settings = {
            "device_slots": device_slots,
            "host_slots": host_slots,
            "policy": policy,
            "predictor": predictor,
            "prefetch_depth": None if predictor == "none" else rng.randint(1, 4),
            "disk_threads": rng.randint(1, 4),
            "emulate_cpu": rng.random() < 0.75,
        }
        print(settings)
        engine = make_engine(packed, rng.choice((3, 24, 200)), "emulated", **settings)
        try:
            assert answers(engine, requests) == expected
        finally:
            engine.close()


def test_same_bits_while_both_tiers_change_their_size(packed: Path, resident: Engine) -> None:
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, resident.info.vocab_size)
    expected = answers(resident, requests)
    total = resident.loaded.runtime.cache.num_slots
    engine = make_engine(
        packed,
        device="emulated",
        device_slots=total // 4,
        host_slots=total // 2,
        predictor="markov",
        emulate_cpu=True,
    )
    supply, host = tiers_of(engine)

    def resize() -> None:
        supply.resize(rng.randint(1, total + 5))
        host.disk.resize(rng.randint(2, total + 5))
        supply.check_integrity()

    try:
        assert answers(engine, requests, between=resize) == expected
        engine.resize_host_memory(1 << 40)
        assert host.disk.cache.num_slots == total
        supply.resize(1)
        host.disk.resize(2)
        assert (supply.cache.num_slots, host.disk.cache.num_slots) == (1, 2)
        assert answers(engine, requests) == expected
        assert [(c.tier, c.num_slots) for c in supply.stats()[0]] == [("device", 1), ("host", 2)]
    finally:
        engine.close()


def test_kv_and_host_slots_share_a_budget_below_a_device(packed: Path, resident: Engine) -> None:
    """Kv takes slots of the host tier while copies to the device are made from them."""
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, resident.info.vocab_size)
    expected = answers(resident, requests)
    kv = KvConfig(num_blocks=80, block_tokens=4)

    def engine_with(budget_bytes: int) -> Engine:
        return Engine.from_config(
            EngineConfig(
                model=ModelConfig(model=str(packed), device="emulated"),
                kv=kv,
                scheduler=SchedulerConfig(max_batch_tokens=24),
                experts=ExpertConfig(
                    cpu_backend="native",
                    num_threads=2,
                    device_slots=rng.choice((1, 10, 40)),
                    host_memory_bytes=budget_bytes,
                    predictor="markov",
                    emulate_cpu=rng.random() < 0.5,
                ),
            )
        )

    with pytest.raises(ConfigError, match="at least") as refused:
        engine_with(4 << 20)
    least = int(re.findall(r"at least (\d+)", str(refused.value))[0])
    engine = engine_with(least)
    supply, host = tiers_of(engine)
    sizes: set[int] = set()

    def check() -> None:
        division = engine.stats().memory
        assert division is not None
        cache = host.disk.cache
        assert not cache.num_owed
        slots_bytes = cache.num_slots * host.disk.slots.slot_bytes
        assert slots_bytes + engine.kv_bytes + division.weights_bytes <= least
        sizes.add(cache.num_slots)
        supply.check_integrity()

    try:
        assert answers(engine, requests, between=check) == expected
        assert len(sizes) > 1, "kv took no slots"
    finally:
        engine.close()


def test_the_time_by_the_profile_is_the_same_again(packed: Path) -> None:
    """The disk's, too: two runs differ in nothing that counts, whatever this machine does."""
    seed = fresh_seed()
    seen = []
    for _ in range(2):
        engine = make_engine(
            packed,
            device="emulated",
            device_slots=12,
            host_slots=20,
            predictor="markov",
            emulate_cpu=True,
        )
        try:
            answers(engine, make_requests(random.Random(seed), engine.info.vocab_size))
            supply, host = tiers_of(engine)
            links = supply.stats()[1]
            assert sum(links[1].stall_s) > 0, "steps wait for the disk"
            assert sum(links[1].demand_bytes) > 0
            counts = [supply.cache.counters.totals(), host.disk.cache.counters.totals()]
            seen.append((supply.device.clock.now_us(), counts, links))
        finally:
            engine.close()
    assert seen[0] == seen[1]


def test_a_profile_without_a_disk_cannot_tell_its_time(packed: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(encode_profile(replace(shipped_profile("rtx4090-pcie4"), disk=[])))
    settings = {"device_slots": 4, "host_slots": 4, "device_profile": str(file)}
    with pytest.raises(ConfigError, match="says nothing of a disk"):
        make_engine(packed, device="emulated", emulate_cpu=True, **settings)
    make_engine(packed, device="emulated", **settings).close()  # this one has its own


@pytest.mark.parametrize("emulate_cpu", [False, True])
def test_a_disk_that_fails_ends_its_requests_and_nothing_else(
    emulate_cpu: bool, packed: Path, tmp_path: Path
) -> None:
    """And when the files are whole again, the same engine answers as if nothing had been."""
    rng = random.Random(fresh_seed())
    copy = tmp_path / "model"
    shutil.copytree(packed, copy)
    engine = make_engine(
        copy,
        device="emulated",
        device_slots=6,
        host_slots=4,
        predictor="markov",
        emulate_cpu=emulate_cpu,
    )
    try:
        requests = make_requests(rng, engine.info.vocab_size)
        expected = answers(engine, requests)
        files = sorted(copy.glob("packed-*.safetensors"))
        whole = {file: file.read_bytes() for file in files}
        for file in files:  # every record, wherever it lies
            content = bytearray(whole[file])
            for place in range(4096, len(content), 1024):
                content[place] ^= 0x55
            file.write_bytes(content)
        engine.add(requests[0])
        deltas = list(itertools.chain.from_iterable(iter(engine.step, [])))
        assert [delta.finish_reason for delta in deltas] == [FinishReason.ERROR]
        assert deltas[0].error_code is ErrorCode.UNAVAILABLE
        assert "checksum" in str(deltas[0].error)
        clock = tiers_of(engine)[0].device.clock
        clock.wait_until(clock.now_us() + 1e6)  # whatever else was being read has failed, too
        engine.check_integrity()
        for file in files:
            file.write_bytes(whole[file])
        assert answers(engine, requests) == expected
    finally:
        engine.close()
