"""Experts on an emulated device: the same bits for every policy, predictor and number of slots, and
what is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engine_answers import answers, make_engine, make_requests
from support.randomness import fresh_seed

from moeserve.cache.policies import registry
from moeserve.config import BUNDLED_MODEL, ExpertConfig
from moeserve.core import ConfigError, ExpertKey
from moeserve.engine.engine import Engine
from moeserve.experts.device.slot_guard import SlotConflict
from moeserve.experts.device_supply import DeviceSupply
from moeserve.experts.schedule.profile_file import encode_profile, shipped_profile

POLICIES = sorted(set(registry.POLICIES) - {"resident"})
PREDICTORS = ("none", "frequency", "markov", "gate_lookahead")
PROFILE = "rtx4090-pcie4"


@pytest.fixture(scope="module")
def host_only(packed: Path) -> Iterator[Engine]:
    engine = make_engine(packed)
    yield engine
    engine.close()


def supply_of(engine: Engine) -> DeviceSupply:
    supply = engine.loaded.runtime.supply
    assert isinstance(supply, DeviceSupply)
    return supply


@pytest.mark.parametrize("policy", POLICIES)
def test_same_bits_whatever_the_machinery(policy: str, packed: Path, host_only: Engine) -> None:
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, host_only.info.vocab_size)
    expected = answers(host_only, requests)
    total = host_only.loaded.runtime.cache.num_slots
    for num_slots in (1, rng.randint(2, total // 4), rng.randint(total // 4, total), total):
        predictor = rng.choice(PREDICTORS)
        settings = {
            "device_slots": num_slots,
            "policy": policy,
            "predictor": predictor,
            "prefetch_depth": None if predictor == "none" else rng.randint(1, 4),
            "emulate_cpu": rng.random() < 0.75,
        }
        print(settings)
        engine = make_engine(packed, rng.choice((3, 24, 200)), "emulated", **settings)
        try:
            assert answers(engine, requests) == expected
            if settings["emulate_cpu"]:  # else the CPU, alone, may be faster with such experts
                assert supply_of(engine).device.busy_us > 0
        finally:
            engine.close()


def test_same_bits_from_a_checkpoint_that_is_packed_as_it_is_read() -> None:
    rng = random.Random(fresh_seed())
    plain = make_engine(BUNDLED_MODEL)
    requests = make_requests(rng, plain.info.vocab_size)
    expected = answers(plain, requests)
    plain.close()
    engine = make_engine(
        BUNDLED_MODEL, device="emulated", device_slots=rng.randint(1, 60), emulate_cpu=True
    )
    assert answers(engine, requests) == expected
    assert supply_of(engine).device.busy_us > 0  # one slot alone may never be hit
    engine.close()


def test_same_bits_while_the_cache_changes_its_size(packed: Path, host_only: Engine) -> None:
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, host_only.info.vocab_size)
    expected = answers(host_only, requests)
    total = host_only.loaded.runtime.cache.num_slots
    engine = make_engine(
        packed, device="emulated", device_slots=total // 2, predictor="markov", emulate_cpu=True
    )
    supply = supply_of(engine)

    def resize() -> None:
        supply.resize(rng.randint(1, total + 5))
        supply.check_integrity()

    assert answers(engine, requests, between=resize) == expected
    supply.resize(1)
    assert supply.cache.num_slots == 1
    engine.close()


def test_the_time_by_the_profile_is_the_same_again(packed: Path) -> None:
    seed = fresh_seed()
    times = []
    for _ in range(2):
        engine = make_engine(
            packed, device="emulated", device_slots=30, predictor="markov", emulate_cpu=True
        )
        answers(engine, make_requests(random.Random(seed), engine.info.vocab_size))
        times.append(supply_of(engine).device.clock.now_us())
        engine.close()
    assert times[0] == times[1] > 0


def test_memory_and_slots_are_two_ways_to_say_it(packed: Path) -> None:
    probe = make_engine(packed, device="emulated", device_slots=3)
    slot_bytes = supply_of(probe).device.slots.slot_bytes
    probe.close()
    engine = make_engine(
        packed, device="emulated", device_memory_bytes=7 * slot_bytes + slot_bytes // 2
    )
    assert supply_of(engine).cache.num_slots == 7
    assert "7 of " in engine.info.notes["device_experts"]
    assert "RTX 4090" in engine.info.notes["device"]
    engine.close()
    with pytest.raises(ConfigError, match=f"hold no expert of {slot_bytes}"):
        make_engine(packed, device="emulated", device_memory_bytes=slot_bytes - 1)


def test_profiles_are_found_by_name_and_by_file(packed: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(encode_profile(shipped_profile(PROFILE)))
    make_engine(packed, device="emulated", device_slots=1, device_profile=str(file)).close()
    with pytest.raises(ConfigError, match=r"'gtx' is no file and not one of .*rtx4090"):
        make_engine(packed, device="emulated", device_slots=1, device_profile="gtx")


def test_what_makes_no_sense_is_refused(packed: Path) -> None:
    with pytest.raises(ConfigError, match="give --device-memory or --device-slots"):
        make_engine(packed, device="emulated")
    with pytest.raises(ConfigError, match="device_slots: it is for a device beside the CPU"):
        make_engine(packed, device_slots=3)
    with pytest.raises(ConfigError, match="contradict each other"):
        ExpertConfig(device_slots=3, device_memory_bytes=1 << 30)
    with pytest.raises(ConfigError, match="device_slots: 0 is below the minimum 1"):
        ExpertConfig(device_slots=0)


def test_an_expert_said_to_be_there_before_it_is_there_raises(packed: Path) -> None:
    """A mistake made on purpose, in a real engine: a copy is reported before it has arrived."""
    rng = random.Random(fresh_seed())
    engine = make_engine(packed, device="emulated", device_slots=90, emulate_cpu=True)
    supply = supply_of(engine)
    keys = [ExpertKey(layer, e) for layer in supply.cache.numbers.layers for e in range(15)]
    loads = supply.cache.prefetch(keys)
    supply.prefetch(loads)
    for load in loads:
        supply.cache.complete(load.key)
    with pytest.raises(SlotConflict, match="is read for"):
        answers(engine, make_requests(rng, engine.info.vocab_size))
    engine.close()
