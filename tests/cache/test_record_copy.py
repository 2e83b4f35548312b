"""A record that arrives in pieces, in any order, is checked in its own order and once."""

from __future__ import annotations

import random

import pytest
from support.randomness import fresh_seed

from moeserve.cache.record_copy import (
    ALIGNMENT,
    RecordCopy,
    Urgency,
    equal_chunk,
    num_chunks,
)
from moeserve.cache.tiers.source import RecordCheck, StoreError
from moeserve.cache.types import Load
from moeserve.core import ExpertKey


class Expected(RecordCheck):
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.seen = b""
        self.finished = 0

    def update(self, piece: memoryview) -> None:
        self.seen += piece

    def finish(self) -> None:
        self.finished += 1
        if self.seen != self.content:
            raise StoreError("not what was stored")


def copy_of(content: bytes, stored: bytes | None = None) -> tuple[RecordCopy, Expected]:
    check = Expected(content if stored is None else stored)
    load = Load(ExpertKey(0, 0), 0)
    return RecordCopy(load, Urgency.DEMAND, memoryview(content), check, 0.0), check


def run(
    copy: RecordCopy, rng: random.Random, chunk: int, fails_at: int | None = None
) -> list[bool]:
    """Threads in any order, one doing one thing at a time. Whether it was complete, after each."""
    reading: list[tuple[int, int]] = []
    checking: list[tuple[int, int]] = []
    complete: list[bool] = []
    while not copy.complete:
        can = [copy.error is None and not copy.all_given, bool(reading), bool(checking)]
        action = rng.choice([number for number, possible in enumerate(can) if possible])
        if action == 0:
            reading.append(copy.take(chunk))
        elif action == 1:
            start, stop = reading.pop(rng.randrange(len(reading)))
            failed = fails_at is not None and start <= fails_at < stop
            copy.arrived(start, stop, StoreError("gone") if failed else None)
        else:
            start, stop = checking.pop()
            copy.checked(stop, copy.check_piece(start, stop))
        if not copy.complete and (piece := copy.take_piece()):
            assert not checking, "two threads take one sum"
            checking.append(piece)
        complete.append(copy.complete)
    assert not reading, "complete while a thread writes"
    assert not checking, "complete while a thread looks at it"
    return complete


def test_every_order_of_arrivals() -> None:
    rng = random.Random(fresh_seed())
    for _ in range(300):
        content = rng.randbytes(rng.randint(1, 50))
        copy, check = copy_of(content)
        complete = run(copy, rng, rng.randint(1, 12))
        assert complete.count(True) == 1
        assert copy.error is None
        assert check.seen == content
        assert check.finished == 1


def test_a_wrong_byte_anywhere_is_found() -> None:
    rng = random.Random(fresh_seed())
    for _ in range(100):
        content = rng.randbytes(rng.randint(1, 50))
        place = rng.randrange(len(content))
        stored = bytearray(content)
        stored[place] ^= 1 << rng.randrange(8)
        copy, _ = copy_of(content, bytes(stored))
        assert run(copy, rng, rng.randint(1, 12)).count(True) == 1
        with pytest.raises(StoreError, match="not what was stored"):
            raise copy.error or AssertionError("taken for right")


def test_a_piece_that_cannot_be_read_ends_it_when_nobody_is_at_it() -> None:
    rng = random.Random(fresh_seed())
    for _ in range(100):
        content = rng.randbytes(rng.randint(1, 50))
        copy, check = copy_of(content)
        assert run(copy, rng, rng.randint(1, 12), rng.randrange(len(content))).count(True) == 1
        assert str(copy.error) == "gone"
        assert check.finished == 0


def test_chunks_of_a_record_are_equal_and_about_as_long_as_they_are_to_be() -> None:
    rng = random.Random(fresh_seed())
    for _ in range(300):
        about, size = rng.randint(1, 400) * ALIGNMENT, rng.randint(1, 8_000_000)
        each = equal_chunk(size, about)
        assert each % ALIGNMENT == 0
        lengths = [min(each, size - start) for start in range(0, size, each)]
        assert sum(lengths) == size
        assert len(lengths) <= num_chunks(size, about)
        assert each < 1.5 * about + ALIGNMENT
        assert len(lengths) == 1 or each >= about / 1.5
        assert max(lengths) - min(lengths) <= num_chunks(size, about) * ALIGNMENT
