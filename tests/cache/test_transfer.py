"""Copies into slots: what arrives, in which order, and what happens when a source fails."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.expert_files import write_records
from support.randomness import fresh_seed

from moeserve.cache import transfer
from moeserve.cache.expert_cache import Load
from moeserve.cache.record_copy import Urgency
from moeserve.cache.tiers.disk_store import DiskStore
from moeserve.cache.tiers.host_slots import HostSlots
from moeserve.cache.tiers.source import ExpertSource, RecordCheck, StoreError
from moeserve.cache.transfer import Arrival, Transfers
from moeserve.core import ExpertKey

PAGE = 4096


class MemoryCheck(RecordCheck):
    def __init__(self, expected: bytes) -> None:
        self._expected = expected
        self._found = b""

    def update(self, piece: memoryview) -> None:
        self._found += piece

    def finish(self) -> None:
        if self._found != self._expected:
            raise StoreError("not what was stored")


class MemorySource(ExpertSource):
    """Records in memory. `gate`: reads wait for it. `errors`: what the next reads raise."""

    def __init__(self, num_experts: int, record_bytes: int, rng: random.Random) -> None:
        self.contents = {
            ExpertKey(0, expert): rng.randbytes(record_bytes) for expert in range(num_experts)
        }
        self.gate = threading.Semaphore(10**9)
        self.begun: list[tuple[int, int]] = []  # (expert, start)
        self.reading = threading.Semaphore(0)  # one for every read that has begun
        self.errors: list[Exception] = []
        self.lock = threading.Lock()

    def num_bytes(self, key: ExpertKey) -> int:
        return len(self.contents[key])

    def read(self, key: ExpertKey, start: int, into: memoryview) -> None:
        with self.lock:
            self.begun.append((key.expert, start))
            error = self.errors.pop(0) if self.errors else None
        self.reading.release()
        self.gate.acquire()
        if error is not None:
            raise error
        into[:] = self.contents[key][start : start + len(into)]

    def begin_check(self, key: ExpertKey) -> RecordCheck:
        return MemoryCheck(self.contents[key])

    def close(self) -> None:
        """Memory needs no closing."""


@contextmanager
def running(
    source: ExpertSource,
    num_slots: int,
    slot_bytes: int,
    threads: int = 1,
    chunk: int = PAGE,
    prefetch_threads: int | None = None,
) -> Iterator[tuple[Transfers, HostSlots]]:
    slots = HostSlots(slot_bytes, num_slots)
    transfers = Transfers(
        source, slots.__getitem__, threads, chunk, prefetch_threads=prefetch_threads
    )
    try:
        yield transfers, slots
    finally:
        transfers.close()


def load(expert: int, slot: int | None = None) -> Load:
    return Load(ExpertKey(0, expert), expert if slot is None else slot)


def take(transfers: Transfers, count: int) -> list[Arrival]:
    arrivals: list[Arrival] = []
    while len(arrivals) < count:
        arrivals += transfers.wait()
    assert len(arrivals) == count
    transfers.check_integrity()
    return arrivals


def test_every_byte_arrives(tmp_path: Path) -> None:
    """From a real file, by several threads, in chunks that do not divide a record."""
    rng = random.Random(fresh_seed())
    written = write_records(tmp_path, rng, num_layers=2, num_experts=8)
    store = DiskStore(written.records)
    chunk = PAGE * rng.randint(1, 12)
    with running(store, 16, written.record_bytes, rng.randint(1, 6), chunk) as (transfers, slots):
        order = rng.sample(sorted(written.records), 16)
        loads = [Load(key, slot) for slot, key in enumerate(order)]
        for first in range(0, 16, 4):
            transfers.start(loads[first : first + 4], rng.choice(list(Urgency)))
        for arrival in take(transfers, 16):
            assert arrival.error is None
            content = slots[arrival.load.slot][: written.record_bytes].tobytes()
            assert content == written.contents[arrival.load.key]
        assert transfers.num_active == 0
        stats = transfers.stats
        assert stats.demand_bytes + stats.prefetch_bytes == 16 * written.record_bytes
        assert stats.num_demands + stats.num_prefetches == 16
    store.close()


def test_a_demand_overtakes_prefetches_between_two_chunks() -> None:
    source = MemorySource(4, 4 * PAGE, random.Random(fresh_seed()))
    source.gate = threading.Semaphore(0)
    with running(source, 4, 4 * PAGE) as (transfers, _):
        transfers.start([load(0), load(1)], Urgency.PREFETCH)
        source.reading.acquire()  # the first chunk of expert 0 is being read
        transfers.start([load(2), load(3)], Urgency.DEMAND)
        source.gate.release(16)
        arrived = [arrival.load.key.expert for arrival in take(transfers, 4)]
    assert arrived == [2, 3, 0, 1]
    assert [expert for expert, _ in source.begun] == [0, *[2] * 4, *[3] * 4, *[0] * 3, *[1] * 4]


def test_prefetches_leave_threads_to_demands() -> None:
    """One thread of three reads on a guess; a demand, promoted or not, has them all."""
    source = MemorySource(3, 6 * PAGE, random.Random(fresh_seed()))
    source.gate = threading.Semaphore(0)
    with running(source, 3, 6 * PAGE, threads=3, prefetch_threads=1) as (transfers, _):
        transfers.start([load(0), load(1)], Urgency.PREFETCH)
        for num_begun in range(1, 4):  # one after the other, whatever threads are free
            source.reading.acquire()
            assert source.begun == [(0, PAGE * n) for n in range(num_begun)]
            source.gate.release()
        source.reading.acquire()  # the fourth chunk, which goes on
        transfers.start([load(2)], Urgency.DEMAND)
        source.reading.acquire()
        source.reading.acquire()
        assert sorted(source.begun[4:]) == [(2, 0), (2, PAGE)]
        transfers.promote([ExpertKey(0, 0), ExpertKey(0, 1)])
        source.gate.release(15)
        arrived = [arrival.load.key.expert for arrival in take(transfers, 3)]
    assert sorted(arrived) == [0, 1, 2]
    assert transfers.stats.num_promoted == 2


def test_a_promoted_prefetch_wakes_the_threads_that_prefetches_leave_idle() -> None:
    source = MemorySource(1, 6 * PAGE, random.Random(fresh_seed()))
    source.gate = threading.Semaphore(0)
    with running(source, 1, 6 * PAGE, threads=3, prefetch_threads=1) as (transfers, _):
        transfers.start([load(0)], Urgency.PREFETCH)
        source.reading.acquire()
        transfers.promote([ExpertKey(0, 0)])
        source.reading.acquire()
        source.reading.acquire()  # hangs where they sleep: nothing was released
        source.gate.release(6)
        take(transfers, 1)


def test_a_promoted_prefetch_stands_behind_the_demands_that_are_there() -> None:
    source = MemorySource(4, 2 * PAGE, random.Random(fresh_seed()))
    source.gate = threading.Semaphore(0)
    with running(source, 4, 2 * PAGE) as (transfers, _):
        transfers.start([load(3)], Urgency.DEMAND)
        source.reading.acquire()
        transfers.start([load(0), load(1), load(2)], Urgency.PREFETCH)
        transfers.promote([ExpertKey(0, 2), ExpertKey(0, 3)])  # a demand stays one
        source.gate.release(8)
        arrivals = take(transfers, 4)
    assert [arrival.load.key.expert for arrival in arrivals] == [3, 2, 0, 1]
    assert transfers.stats.num_promoted == 1
    assert transfers.stats.num_demands == 1
    assert transfers.stats.num_prefetches == 3


def test_prefetches_that_have_not_begun_are_called_off() -> None:
    source = MemorySource(4, 2 * PAGE, random.Random(fresh_seed()))
    source.gate = threading.Semaphore(0)
    with running(source, 4, 2 * PAGE) as (transfers, slots):
        transfers.start([load(0), load(1), load(2)], Urgency.PREFETCH)
        source.reading.acquire()  # expert 0 has begun
        off = transfers.cancel_prefetches()
        assert [each.key.expert for each in off] == [1, 2]
        source.gate.release(2)
        assert [arrival.load.key.expert for arrival in take(transfers, 1)] == [0]
        assert not slots[1].any()
        assert not slots[2].any()


def test_an_error_that_passes_is_survived() -> None:
    source = MemorySource(1, 3 * PAGE, random.Random(fresh_seed()))
    source.errors = [OSError(5, "Input/output error")] * (transfer.NUM_ATTEMPTS - 1)
    with running(source, 1, 3 * PAGE) as (transfers, slots):
        transfers.start([load(0)], Urgency.DEMAND)
        (arrival,) = take(transfers, 1)
        assert arrival.error is None
        assert slots[0].tobytes() == source.contents[ExpertKey(0, 0)]
        assert transfers.stats.num_retries == transfer.NUM_ATTEMPTS - 1


def test_an_error_that_stays_fails_that_record_only() -> None:
    source = MemorySource(2, 3 * PAGE, random.Random(fresh_seed()))
    source.errors = [OSError(5, "Input/output error")] * transfer.NUM_ATTEMPTS
    with running(source, 2, 3 * PAGE) as (transfers, slots):
        transfers.start([load(0), load(1)], Urgency.DEMAND)
        arrivals = {each.load.key.expert: each for each in take(transfers, 2)}
        error = arrivals[0].error
        assert error is not None
        assert "Input/output error" in str(error)
        assert arrivals[1].error is None
        assert slots[1].tobytes() == source.contents[ExpertKey(0, 1)]
        assert transfers.stats.num_failed == 1
        transfers.start([load(0)], Urgency.DEMAND)  # and it may be tried again
        assert take(transfers, 1)[0].error is None


def test_other_threads_finish_their_chunks_of_a_record_that_failed() -> None:
    """The slot is only handed back when nobody writes to it any more."""
    source = MemorySource(1, 4 * PAGE, random.Random(fresh_seed()))
    source.gate = threading.Semaphore(0)
    source.errors = [StoreError("gone")]
    with running(source, 1, 4 * PAGE, threads=3) as (transfers, _):
        transfers.start([load(0)], Urgency.DEMAND)
        for _ in range(3):
            source.reading.acquire()
        assert transfers.finished() == []
        source.gate.release(4)  # the last chunk may be taken before the error is known
        (arrival,) = take(transfers, 1)
        assert str(arrival.error) == "gone"
        assert len(source.begun) <= 4


def test_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    rng = random.Random(fresh_seed())
    written = write_records(tmp_path, rng, num_layers=1, num_experts=2)
    store = DiskStore(written.records)
    content = bytearray(written.path.read_bytes())
    place = written.records[ExpertKey(0, 1)].start + rng.randrange(written.record_bytes)
    content[place] ^= 1
    written.path.write_bytes(content)
    with running(store, 2, written.record_bytes, 3) as (transfers, _):
        transfers.start([load(0), load(1)], Urgency.DEMAND)
        errors = {each.load.key.expert: each.error for each in take(transfers, 2)}
        assert errors[0] is None
        assert "checksum" in str(errors[1])
    store.close()


def test_a_stall_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(transfer, "STALL_WARNING_S", 0.01)
    source = MemorySource(1, PAGE, random.Random(fresh_seed()))
    source.gate = threading.Semaphore(0)

    class Opening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            source.gate.release()

    handler = Opening()
    logging.getLogger(transfer.__name__).addHandler(handler)
    try:
        with running(source, 1, PAGE) as (transfers, _):
            transfers.start([load(0)], Urgency.DEMAND)
            take(transfers, 1)
            assert transfers.stats.stall_s > 0
    finally:
        logging.getLogger(transfer.__name__).removeHandler(handler)
    assert "layer 0, expert 0 has been on its way" in caplog.text


def test_closing_while_copies_wait() -> None:
    source = MemorySource(3, 2 * PAGE, random.Random(fresh_seed()))
    with running(source, 3, 2 * PAGE, threads=2) as (transfers, _):
        transfers.start([load(0), load(1), load(2)], Urgency.PREFETCH)
        transfers.close()
        transfers.close()
