"""Records in files, read past the page cache, and the memory that they are read into."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest
from support.expert_files import write_records
from support.randomness import fresh_seed

from moeserve.cache.tiers.disk_store import DiskRecord, DiskStore
from moeserve.cache.tiers.host_slots import REGION_BYTES, HostSlots
from moeserve.cache.tiers.source import StoreError
from moeserve.core import ExpertKey


def test_reads_what_was_written(tmp_path: Path) -> None:
    rng = random.Random(fresh_seed())
    written = write_records(tmp_path, rng, num_layers=3, num_experts=5)
    store = DiskStore(written.records)
    slots = HostSlots(written.record_bytes, 2)
    for key, content in written.contents.items():
        record = slots[1][: store.num_bytes(key)].data
        cuts = sorted(rng.sample(range(1, len(record) // 4096), 3))
        edges = [0, *(cut * 4096 for cut in cuts), len(record)]
        for start, stop in itertools.pairwise(edges):
            store.read(key, start, record[start:stop])
        assert bytes(record) == content
        store.check(key, record)
    store.close()


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    rng = random.Random(fresh_seed())
    written = write_records(tmp_path, rng, num_layers=1, num_experts=3)
    key = ExpertKey(0, 1)
    store = DiskStore(written.records)
    place = written.records[key].start + rng.randrange(written.record_bytes)
    with written.path.open("r+b") as file:
        file.seek(place)
        old = file.read(1)
        file.seek(place)
        file.write(bytes([old[0] ^ 0x10]))
        os.fsync(file.fileno())
    record = HostSlots(written.record_bytes, 1)[0][: written.record_bytes].data
    store.read(key, 0, record)
    with pytest.raises(StoreError, match=r"layer 0, expert 1: checksum .* expected, .* found"):
        store.check(key, record)
    store.close()


@pytest.mark.parametrize("during", [False, True])
def test_a_record_is_summed_up_again_when_its_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: bool
) -> None:
    """during: it changes while the record is read for the second time."""
    monkeypatch.setattr("moeserve.cache.tiers.disk_store.RACY_NS", 0)
    rng = random.Random(fresh_seed())
    written = write_records(tmp_path, rng, num_layers=1, num_experts=3)
    key = ExpertKey(0, rng.randrange(3))
    store = DiskStore(written.records)
    record = HostSlots(written.record_bytes, 1)[0][: written.record_bytes].data
    store.read(key, 0, record)
    store.check(key, record)
    place = rng.randrange(written.record_bytes)
    record[place] ^= 0x10
    store.check(key, record)  # the file is as it was: nobody sums
    check = store.begin_check(key) if during else None
    with written.path.open("r+b") as file:
        file.seek(written.records[key].start + place)
        file.write(record[place : place + 1])
    check = check or store.begin_check(key)
    check.update(record[: written.record_bytes // 2])
    check.update(record[written.record_bytes // 2 :])
    with pytest.raises(StoreError, match="checksum"):
        check.finish()
    with pytest.raises(StoreError, match="checksum"):  # nor is it taken for right from now on
        store.check(key, record)
    store.close()


def test_a_file_written_just_now_is_not_trusted(tmp_path: Path) -> None:
    written = write_records(tmp_path, random.Random(fresh_seed()), num_layers=1, num_experts=1)
    key = ExpertKey(0, 0)
    store = DiskStore(written.records)
    record = HostSlots(written.record_bytes, 1)[0][: written.record_bytes].data
    store.read(key, 0, record)
    store.check(key, record)
    record[0] ^= 1
    with pytest.raises(StoreError, match="checksum"):
        store.check(key, record)
    store.close()


def test_a_file_that_is_too_short_is_refused_at_the_start_and_later(tmp_path: Path) -> None:
    written = write_records(tmp_path, random.Random(fresh_seed()), num_layers=1, num_experts=3)
    store = DiskStore(written.records)
    last = written.records[ExpertKey(0, 2)]
    os.truncate(written.path, last.start + 4096)
    record = HostSlots(written.record_bytes, 1)[0][: written.record_bytes].data
    with pytest.raises(StoreError, match=r"ends before byte .* layer 0, expert 2"):
        store.read(ExpertKey(0, 2), 0, record)
    store.close()
    with pytest.raises(StoreError, match=f"{last.start + 4096} bytes, experts' records end at"):
        DiskStore(written.records)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    record = DiskRecord(tmp_path / "gone.safetensors", 0, 4096, 0)
    with pytest.raises(StoreError, match=r"gone\.safetensors: cannot be opened: No such file"):
        DiskStore({ExpertKey(0, 0): record})


def replaced_by(path: Path, content: bytes) -> None:
    """Another file of that name."""
    beside = path.with_name("beside")
    beside.write_bytes(content)
    beside.replace(path)


def test_a_whole_file_in_the_place_of_a_damaged_one_is_read(tmp_path: Path) -> None:
    rng = random.Random(fresh_seed())
    written = write_records(tmp_path, rng, num_layers=1, num_experts=3)
    whole, key = written.path.read_bytes(), ExpertKey(0, rng.randrange(3))
    store = DiskStore(written.records)
    record = HostSlots(written.record_bytes, 1)[0][: written.record_bytes].data
    os.truncate(written.path, 0)
    replaced_by(written.path, whole)
    with pytest.raises(StoreError, match="ends before byte"):  # the one that was opened
        store.verify(key)
    store.doubt(key)
    for other in written.contents:  # a doubted one first or not
        if other != key:
            with pytest.raises(StoreError, match="ends before byte"):
                store.verify(other)
    store.verify(key)
    for other, content in written.contents.items():
        check = store.begin_check(other)
        store.read(other, 0, record)
        check.update(record)
        check.finish()
        assert bytes(record) == content
    store.close()


@pytest.mark.parametrize("other", ["gone", "short", "another"])
def test_a_file_that_is_no_better_is_not_taken(other: str, tmp_path: Path) -> None:
    """What is whole in the one that is open can still be read."""
    rng = random.Random(fresh_seed())
    written = write_records(tmp_path, rng, num_layers=1, num_experts=3)
    whole = written.path.read_bytes()
    store = DiskStore(written.records)
    damaged = bytearray(whole)
    damaged[written.records[ExpertKey(0, 1)].start + rng.randrange(written.record_bytes)] ^= 4
    written.path.write_bytes(damaged)  # in its place
    if other == "gone":
        written.path.unlink()
    elif other == "short":
        replaced_by(written.path, whole[: written.records[ExpertKey(0, 2)].start])
    else:
        replaced_by(written.path, bytes(value ^ 1 for value in whole))
    for _ in range(2):
        with pytest.raises(StoreError, match="layer 0, expert 1: checksum"):
            store.verify(ExpertKey(0, 1))
        store.doubt(ExpertKey(0, 1))
        for expert in (0, 2):
            store.verify(ExpertKey(0, expert))
    replaced_by(written.path, whole)
    store.verify(ExpertKey(0, 1))
    store.close()


def test_slots_do_not_overlap_and_grow(tmp_path: Path) -> None:
    rng = random.Random(fresh_seed())
    slot_bytes = rng.randrange(1, 5 * mmap.PAGESIZE)
    slots = HostSlots(slot_bytes, 3)
    assert slots.slot_bytes % mmap.PAGESIZE == 0
    assert 0 <= slots.slot_bytes - slot_bytes < 4096
    first = slots[0]
    slots.grow(1 + REGION_BYTES // slots.slot_bytes)
    assert slots[0] is first
    for number in range(len(slots)):
        slots[number][:] = number % 251
    for number in range(len(slots)):
        assert (slots[number] == number % 251).all()
        assert slots[number].ctypes.data % mmap.PAGESIZE == 0


def test_given_back_slots_cost_no_memory() -> None:
    """A slot that was given back reads as zeros, because its pages are gone."""
    slots = HostSlots(8 << 20, 4)
    for number in range(4):
        slots[number][:] = 7
    before = _resident_bytes()
    slots.give_back(2)
    assert before - _resident_bytes() >= 7 << 20
    assert not slots[2].any()
    assert (slots[1] == 7).all()
    assert (slots[3] == 7).all()
    slots[2][:] = 9
    assert (slots[2] == 9).all()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_memory_that_is_not_there() -> None:
    with pytest.raises(MemoryError, match="for slots of experts"):
        HostSlots(1 << 60, 1)


def test_records_need_not_be_as_long_as_slots(tmp_path: Path) -> None:
    written = write_records(tmp_path, random.Random(fresh_seed()), num_layers=1, num_experts=2)
    store = DiskStore(written.records)
    slots = HostSlots(written.record_bytes * 3, 1)
    slots[0][:] = 5
    store.read(ExpertKey(0, 0), 0, slots[0][: written.record_bytes].data)
    assert np.all(slots[0][written.record_bytes :] == 5)
    store.close()
