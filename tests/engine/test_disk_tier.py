"""Experts on disk: the same bits for every policy, predictor and number of slots, and what happens
when the files are not what they were."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import threading
import traceback
from pathlib import Path

import pytest
from support.engine_answers import answers, make_engine, make_requests
from support.randomness import fresh_seed

from moeserve.cache.policies import registry
from moeserve.config import (
    BUNDLED_MODEL,
)
from moeserve.core import (
    ConfigError,
    ErrorCode,
    FinishReason,
    ModelError,
)
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.engine.engine import Engine
from moeserve.experts.disk_supply import DiskSupply
from moeserve.models.packed_model import MANIFEST

POLICIES = sorted(set(registry.POLICIES) - {"resident"})
PREDICTORS = ("none", "frequency", "markov", "gate_lookahead", "gate_residual")


def supply_of(engine: Engine) -> DiskSupply:
    supply = engine.loaded.runtime.supply
    assert isinstance(supply, DiskSupply)
    return supply


@pytest.mark.parametrize("policy", POLICIES)
def test_same_bits_whatever_the_machinery(policy: str, packed: Path, resident: Engine) -> None:
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, resident.info.vocab_size)
    expected = answers(resident, requests)
    total = resident.loaded.runtime.cache.num_slots
    num_layers = len(resident.loaded.runtime.cache.numbers.layers)
    for num_slots, predictor in (
        (2, rng.choice(PREDICTORS)),
        (rng.randint(3, total // 4), rng.choice(PREDICTORS)),
        (rng.randint(total // 4, total), rng.choice(PREDICTORS)),
        (total, rng.choice(PREDICTORS)),
    ):
        settings = {
            "host_slots": num_slots,
            "policy": policy,
            "layer_floor": rng.randint(0, num_slots // num_layers),
            "predictor": predictor,
            "prefetch_depth": None if predictor == "none" else rng.randint(1, 4),
            "disk_threads": rng.randint(1, 4),
        }
        print(settings)
        engine = make_engine(packed, max_batch_tokens=rng.choice((3, 24, 200)), **settings)
        try:
            assert answers(engine, requests) == expected
            if predictor == "none":  # waves are no guesses
                counts = supply_of(engine).cache.counters.totals()
                assert counts["prefetches_begun"] == counts["prefetches_wasted"] == 0
        finally:
            engine.close()


def test_cores_are_kept_awake_while_a_step_waits(
    packed: Path, resident: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each stall once, and never else; with the same bits."""
    requests = make_requests(random.Random(fresh_seed()), resident.info.vocab_size)
    expected = answers(resident, requests)
    awake, entered = threading.Lock(), [0]

    class Awake:
        def __enter__(self) -> None:
            assert awake.acquire(blocking=False)
            entered[0] += 1

        def __exit__(self, *_: object) -> None:
            awake.release()

    monkeypatch.setattr(NativeRuntime, "awake", lambda *_: Awake())
    engine = make_engine(packed, host_slots=4)
    try:
        engine.timeline.start()
        assert answers(engine, requests) == expected
        stalls = [span for span in engine.timeline.stop().spans if span.name == "stall"]
    finally:
        engine.close()
    assert entered == [len(stalls)]
    assert stalls


def test_same_bits_while_the_cache_changes_its_size(packed: Path, resident: Engine) -> None:
    rng = random.Random(fresh_seed())
    requests = make_requests(rng, resident.info.vocab_size)
    expected = answers(resident, requests)
    total = resident.loaded.runtime.cache.num_slots
    engine = make_engine(packed, host_slots=total // 2, policy="lru", predictor="markov")
    supply = supply_of(engine)

    def resize() -> None:
        supply.resize(rng.randint(2, total + 5))
        supply.check_integrity()

    try:
        assert answers(engine, requests, between=resize) == expected
        supply.resize(2)
        assert supply.cache.num_slots == 2
    finally:
        engine.close()


def test_what_cannot_be_tiered_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `moeserve pack"):
        make_engine(BUNDLED_MODEL, host_slots=10)
    with pytest.raises(ConfigError, match="policy: 'lru' is for experts that do not all fit"):
        make_engine(packed, policy="lru")
    with pytest.raises(ConfigError, match="contradict each other"):
        make_engine(packed, host_slots=4, host_memory_bytes=1 << 30)
    with pytest.raises(ConfigError, match=r"layer_floor: 4 .* there is room for 20") as refused:
        make_engine(packed, host_slots=20, layer_floor=4)
    assert "3 at most" in str(refused.value.hint)  # of the bundled model's 6 layers
    old = tmp_path / "old"
    shutil.copytree(packed, old)
    manifest = json.loads((old / MANIFEST).read_text())
    for entry in manifest["weights"].values():
        entry.pop("checksums", None)
    (old / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"0 checksums for .* experts"):
        make_engine(old, host_slots=10)


@pytest.mark.parametrize("again", ["in place", "another file"])
def test_a_record_that_was_changed_ends_its_requests_and_nothing_else(
    again: str, packed: Path, tmp_path: Path
) -> None:
    """And when the file is whole again, the same engine answers as if nothing had been."""
    rng = random.Random(fresh_seed())
    copy = tmp_path / "model"
    shutil.copytree(packed, copy)
    engine = make_engine(copy, host_slots=4)
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
        assert "pack the model again" in str(deltas[0].error)
        kept = supply_of(engine).trouble
        assert kept is not None
        raised_through = [frame.name for frame in traceback.extract_tb(kept.__traceback__)]
        assert "_as_they_arrive" not in raised_through, "a step's tensors live as long as it does"
        engine.check_integrity()
        assert "checksum" in str(engine.trouble)
        engine.retry_failed_reads(60)
        assert engine.trouble
        for file in files:
            if again == "another file":
                file.unlink()
            file.write_bytes(whole[file])
        if rng.random() < 0.5:  # without it the step that wants them finds it out
            engine.retry_failed_reads(60)
            assert engine.trouble is None
        assert answers(engine, requests) == expected
        engine.retry_failed_reads(60)  # of guesses
        assert engine.trouble is None
    finally:
        engine.close()
