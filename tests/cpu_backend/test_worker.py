"""The worker by itself: its results are the backend's bits, and nonsense is refused by it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st
from support.randomness import fresh_generators
from support.workers import worker_thread

from moeserve.config import BUNDLED_MODEL, ModelConfig
from moeserve.core import ConfigError, ModelError
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.shards import Shard
from moeserve.cpu_backend.shared_rows import PAGE_BYTES, SharedRows
from moeserve.cpu_backend.worker import HeldExperts
from moeserve.cpu_backend.worker_wire import WORKER_VERSION, engine_side_wire
from moeserve.messages import Message, Ping
from moeserve.models.shard import load_shard
from moeserve.worker_messages import (
    SharedMemory,
    WorkerHello,
    WorkerJob,
    WorkerRefusal,
    WorkerResult,
    WorkerWelcome,
)

SHARD = "1/2"


@pytest.fixture(scope="module")
def native() -> NativeRuntime:
    return NativeRuntime(1)


@pytest.fixture(scope="module")
def held(packed_int8: Path, native: NativeRuntime) -> HeldExperts:
    """All experts, to compute what a worker should."""
    return load_shard(ModelConfig(model=str(packed_int8)), Shard.parse("0/1"), native, mapped=True)


class RawEngine:
    """Speaks to a worker without the engine's side of it."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self.wire = engine_side_wire()

    def ask(self, message: Message, *raw: bytes) -> tuple[Message, list[bytes]]:
        return self.send([*self.wire.encode(message), *raw])

    def send(self, frames: list[bytes]) -> tuple[Message, list[bytes]]:
        self.socket.send_multipart(frames)
        message: Message = Ping()
        while isinstance(message, Ping):  # the worker looks who is still there
            assert self.socket.poll(30_000), "no answer"
            message, raw = self.wire.decode(self.socket.recv_multipart())
        return message, raw


@pytest.fixture(scope="module")
def engine(
    packed_int8: Path, held: HeldExperts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RawEngine]:
    endpoint = f"ipc://{tmp_path_factory.mktemp('worker')}/w"
    with (
        worker_thread(packed_int8, endpoint, SHARD),
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
    ):
        socket.linger = 0
        socket.connect(endpoint)
        yield RawEngine(socket)


def make_job(held: HeldExperts, rng: random.Random, number: int = 1) -> WorkerJob:
    layer, experts = rng.choice(sorted(held.layers.items()))
    own = Shard.parse(SHARD).experts(experts.spec.num_experts)
    chosen = sorted(rng.sample(own, rng.randint(1, min(5, len(own)))))
    counts = [rng.randint(1, 4) for _ in chosen]
    return WorkerJob(number=number, layer=layer, experts=chosen, counts=counts, dtype="float32")


def expected_results(
    held: HeldExperts, native: NativeRuntime, job: WorkerJob, rows: torch.Tensor
) -> torch.Tensor:
    """The layer in one call, every row with one expert."""
    ids = torch.from_numpy(np.repeat(np.array(job.experts), job.counts)).view(-1, 1)
    out = torch.empty(len(rows), rows.shape[1])
    experts = held.layers[job.layer].native
    experts.run(native.handle, rows, ids, torch.ones(len(rows), 1), None, out)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [False, True])
def test_results_are_the_bits_of_the_backend(
    dtype: str, shared: bool, engine: RawEngine, held: HeldExperts, native: NativeRuntime
) -> None:
    rng, generator = fresh_generators()
    memory = SharedRows.create(1 << 20) if shared else None
    offer = None if memory is None else memory.offer
    welcome, _ = engine.ask(WorkerHello(identity=held.identity, memory=offer))
    assert isinstance(welcome, WorkerWelcome)
    assert welcome.identity == held.identity
    assert (welcome.shard, welcome.shared) == (SHARD, shared)
    for number in range(1, 6):
        job = msgspec.structs.replace(make_job(held, rng, number), dtype=dtype)
        hidden = held.layers[job.layer].spec.hidden_size
        rows = torch.randn(sum(job.counts), hidden, generator=generator).to(getattr(torch, dtype))
        expected = expected_results(held, native, job, rows)
        if memory is None:
            answer, raw = engine.ask(job, rows.view(torch.uint8).numpy().tobytes())
            found = torch.frombuffer(bytearray(raw[0]), dtype=torch.float32).view(expected.shape)
        else:
            results_at = PAGE_BYTES + rows.nbytes
            place = memory.view(PAGE_BYTES, (len(rows), hidden), rows.dtype)
            assert place is not None
            place.copy_(rows)
            job = msgspec.structs.replace(job, rows_at=PAGE_BYTES, results_at=results_at)
            answer, raw = engine.ask(job)
            assert raw == []
            room = memory.view(results_at, (len(rows), hidden), torch.float32)
            assert room is not None
            found = room
        assert isinstance(answer, WorkerResult)
        assert answer.number == number
        assert answer.busy_s > 0
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_jobs_that_make_no_sense_are_refused_and_the_worker_goes_on(
    engine: RawEngine, held: HeldExperts
) -> None:
    rng, _ = fresh_generators()
    engine.ask(WorkerHello(identity=held.identity))
    job = make_job(held, rng, 7)
    hidden = held.layers[job.layer].spec.hidden_size
    good = bytes(sum(job.counts) * hidden * 4)
    change = msgspec.structs.replace
    for wrong, raw, reason in (
        (change(job, layer=999), good, "layer 999"),
        (change(job, dtype="complex64"), good, "complex64"),
        (change(job, experts=[0, *job.experts], counts=[1, *job.counts]), good, "not all in 1/2"),
        (change(job, experts=[10_001], counts=[1]), good, "not all in 1/2"),
        (change(job, counts=job.counts[1:]), good, "count of at least 1"),
        (change(job, counts=[0, *job.counts[1:]]), good, "count of at least 1"),
        (job, good[:-4], f"one frame of {len(good)} bytes"),
        (change(job, rows_at=0), good, "not in the memory"),
        (change(job, results_at=0), good, "not in the memory"),
    ):
        answer, _ = engine.ask(wrong, raw)
        assert isinstance(answer, WorkerRefusal)
        assert answer.number == 7
        assert reason in answer.reason
    for frames in ([WORKER_VERSION, b"\xc1"], [b"MOESERVE-WORKER/0", b"\x80"], [WORKER_VERSION]):
        answer, _ = engine.send(frames)
        assert isinstance(answer, WorkerRefusal)
        assert answer.number is None
    answer, raw_results = engine.ask(job, good)
    assert isinstance(answer, WorkerResult)
    assert answer.number == 7
    assert len(raw_results[0]) == len(good)


def test_a_worker_reads_its_shard_and_nothing_else(
    packed_int8: Path, native: NativeRuntime, tmp_path: Path
) -> None:
    config = ModelConfig(model=str(packed_int8))
    copied = load_shard(config, Shard.parse("2-3"), native)
    for experts in copied.layers.values():
        hidden = experts.spec.hidden_size
        for expert in range(experts.spec.num_experts):
            ids, ones = torch.full((1, 1), expert), torch.ones(1, 1)
            arguments = (
                native.handle,
                torch.ones(1, hidden),
                ids,
                ones,
                None,
                torch.empty(1, hidden),
            )
            if expert in (2, 3):
                experts.native.run(*arguments)
            else:
                with pytest.raises(ValueError, match="has no record"):
                    experts.native.run(*arguments)
    with pytest.raises(ConfigError, match="has no expert of"):
        load_shard(config, Shard.parse("90000-90001"), native)
    with pytest.raises(ModelError, match="run `moeserve pack"):
        load_shard(ModelConfig(model=str(BUNDLED_MODEL)), Shard.parse("0/2"), native)


def test_memory_that_is_not_what_was_offered_is_not_used(tmp_path: Path) -> None:
    memory = SharedRows.create(1 << 16)
    assert memory is not None
    attached = SharedRows.attach(memory.offer)
    assert attached is not None
    room = attached.view(PAGE_BYTES, (2, 3), torch.float32)
    assert room is not None
    room.fill_(7)
    seen = memory.view(PAGE_BYTES, (2, 3), torch.float32)
    assert seen is not None
    assert seen.tolist() == [[7] * 3] * 2
    change = msgspec.structs.replace
    assert SharedRows.attach(change(memory.offer, token=bytes(16))) is None
    assert SharedRows.attach(change(memory.offer, num_bytes=1 << 20)) is None
    assert SharedRows.attach(change(memory.offer, fd=987_654)) is None
    plain = tmp_path / "file"
    plain.write_bytes(memory.offer.token + bytes((1 << 16) - 16))
    with plain.open("r+b") as file:  # not sealed: it could be cut short under us
        offer = SharedMemory(
            pid=os.getpid(), fd=file.fileno(), num_bytes=1 << 16, token=memory.offer.token
        )
        assert SharedRows.attach(offer) is None
    for start in (0, -4096, 1 << 16, PAGE_BYTES + 2):
        assert memory.view(start, (2, 3), torch.float32) is None
    assert memory.view(PAGE_BYTES, (1 << 20, 1 << 20), torch.float32) is None
    memory.close()
    attached.close()


@given(st.integers(1, 40), st.integers(1, 300))
def test_shards_by_remainder_divide_a_layer(count: int, num_experts: int) -> None:
    shards = [Shard.parse(f"{index}/{count}") for index in range(count)]
    together = [e for shard in shards for e in shard.experts(num_experts)]
    assert sorted(together) == list(range(num_experts))
    for shard in shards:
        assert Shard.parse(str(shard)) == shard


def test_shards_by_numbers() -> None:
    assert list(Shard.parse("3-5").experts(128)) == [3, 4, 5]
    assert list(Shard.parse("3-5").experts(4)) == [3]
    assert str(Shard.parse("3-5")) == "3-5"
    for text in ("", "2/2", "5-3", "-1/2", "1/0", "a", "1", "0/2 ", "1/2/3", "٣/٤"):
        with pytest.raises(ConfigError, match="is neither I/N with I below N nor A-B"):
            Shard.parse(text)
