"""Weights that move from small pages into huge ones while they are read: the same bytes, always."""

from __future__ import annotations

import errno
import hashlib
import logging
import mmap
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.randomness import fresh_seed

from moeserve.cpu_backend import _native
from moeserve.cpu_backend.machine import huge_page_mode
from moeserve.cpu_backend.memory_room import MemoryRoom
from moeserve.models import page_mover
from moeserve.models.open_file import OpenFile
from moeserve.models.page_mover import HUGE_PAGE_BYTES, SPARE_BYTES, PageMover
from moeserve.models.safetensors_file import MappedFile

MIB = 1 << 20
AMPLE = MemoryRoom(1 << 50, 1 << 50)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def write_file(path: Path, num_bytes: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Its bytes, which are on disk."""
    content = rng.integers(0, 256, num_bytes, np.uint8)
    with path.open("wb") as file:
        file.write(content.data)
        os.fsync(file.fileno())
    return content


def map_file(path: Path, advice: int = mmap.MADV_NOHUGEPAGE) -> MappedFile:
    """By default in small pages, whatever the page cache has."""
    file = OpenFile(path)
    mapping = mmap.mmap(
        file.handle, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
    )
    mapping.madvise(advice)
    return MappedFile(file, np.frombuffer(mapping, np.uint8))


def whole_huge_pages(memory: NDArray[np.uint8]) -> int:
    """Bytes of a mapping that can stand in huge pages."""
    start = memory.ctypes.data
    first = -(-start // HUGE_PAGE_BYTES)
    return max(0, (start + memory.nbytes) // HUGE_PAGE_BYTES - first) * HUGE_PAGE_BYTES


def counted(memory: NDArray[np.uint8], field: str) -> int:
    """Bytes that the system counts in the mappings where the memory lies (proc(5), smaps)."""
    start, stop = memory.ctypes.data, memory.ctypes.data + memory.nbytes
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            low, high = (int(part, 16) for part in name.split("-"))
            inside = low < stop and start < high
        elif inside and name == f"{field}:":
            total += int(values[0]) * 1024
    return total


def need_huge_pages(mover: PageMover) -> None:
    stats = mover.stats()
    assert stats is not None
    if huge_page_mode() in (None, "never"):
        pytest.skip("transparent huge pages are off here")
    if "had no huge page" in stats.problem:
        pytest.skip(f"memory is in pieces here: {stats.problem}")


class AtPiece:
    """For `is_busy`, which the thread asks after each piece: does something after one of them."""

    def __init__(self, number: int, action: Callable[[], object]) -> None:
        self.number = number
        self.action = action

    def __call__(self) -> bool:
        self.number -= 1
        if self.number == 0:
            self.action()
        return False


def test_readers_see_the_same_bytes_while_pages_move(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Several files of odd sizes, one without a whole huge page; two threads that read all."""
    sizes = [int(rng.integers(20, 40)) * MIB + 4097, MIB + 1, 4096, 6 * MIB - 1, 16 * MIB]
    contents = [write_file(tmp_path / f"{i}", size, rng) for i, size in enumerate(sizes)]
    mapped = [map_file(tmp_path / f"{i}") for i in range(len(sizes))]
    expected = [hashlib.blake2b(content.data).digest() for content in contents]
    for each in mapped:
        each.memory.max()  # all pages are there, small ones
    before = sum(counted(each.memory, "Rss") for each in mapped)
    mover = PageMover(mapped, room=lambda: AMPLE)
    ended = threading.Event()
    wrong: list[int] = []
    num_rounds = [0, 0]

    def read(reader: int) -> None:
        while not ended.is_set() or num_rounds[reader] == 0:
            found = [hashlib.blake2b(each.memory.data).digest() for each in mapped]
            wrong.extend(i for i, digest in enumerate(found) if digest != expected[i])
            num_rounds[reader] += 1

    readers = [threading.Thread(target=read, args=(reader,)) for reader in range(2)]
    for reader in readers:
        reader.start()
    mover.start()
    mover.wait()
    ended.set()
    for reader in readers:
        reader.join()
    assert not wrong
    for each, content in zip(mapped, contents, strict=True):
        assert np.array_equal(each.memory, content)
    stats = mover.stats()
    assert stats is not None
    assert stats.mapped_bytes == sum(sizes)
    assert not stats.moving
    need_huge_pages(mover)
    assert stats.problem == ""
    assert stats.moved_bytes == sum(whole_huge_pages(each.memory) for each in mapped) > 0
    assert sum(counted(each.memory, "AnonHugePages") for each in mapped) >= stats.moved_bytes
    assert sum(counted(each.memory, "Rss") for each in mapped) <= before, "memory was taken twice"


def test_what_was_moved_is_one_mapping(tmp_path: Path, rng: np.random.Generator) -> None:
    """A process may have 65530 mappings: one for every piece would end at 128 GiB."""
    write_file(tmp_path / "file", 32 * MIB, rng)
    mapped = map_file(tmp_path / "file")
    mover = PageMover([mapped], room=lambda: AMPLE)
    mover.start()
    mover.wait()
    need_huge_pages(mover)
    start = mapped.memory.ctypes.data
    ranges = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines()]
    bounds = [tuple(int(part, 16) for part in text.split("-")) for text in ranges]
    inside = [b for b in bounds if b[0] < start + mapped.memory.nbytes and start < b[1]]
    assert len(inside) <= 3  # what was moved, and a part of the file before and after it


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(20 * MIB)
        file.write(b"other bytes")
    os.utime(path)  # the clock of a file system may be coarser than a test is fast


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: os.truncate(path, 5 * MIB), "expected 2097152 bytes from .* on, found "),
        (lambda path: os.truncate(path, 9 * MIB), "changed from 25165824 to 9437184 bytes"),
        (overwrite, "written to while it is in use"),
    ],
    ids=["cut here", "cut further on", "written to"],
)
def test_a_file_that_changes_meanwhile(
    change: Callable[[Path], object], said: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """After two pieces. What was moved before does not depend on the file any more."""
    path = tmp_path / "file"
    content = write_file(path, 24 * MIB, rng)
    mapped = map_file(path)
    busy = AtPiece(2, lambda: change(path))
    mover = PageMover([mapped], is_busy=busy, room=lambda: AMPLE, mode="madvise")
    mover.start()
    mover.wait()
    stats = mover.stats()
    assert stats is not None
    assert re.search(f"{re.escape(str(path))}: {said}", stats.problem)
    assert stats.moved_bytes <= 2 * HUGE_PAGE_BYTES
    assert np.array_equal(mapped.memory[: 4 * MIB], content[: 4 * MIB])


def test_close_in_the_middle(tmp_path: Path, rng: np.random.Generator) -> None:
    content = write_file(tmp_path / "file", 64 * MIB, rng)
    mapped = map_file(tmp_path / "file")
    reached, closing = threading.Event(), threading.Event()

    def busy() -> bool:
        reached.set()
        return closing.wait()

    mover = PageMover([mapped], is_busy=busy, room=lambda: AMPLE, mode="madvise")
    mover.start()
    reached.wait()
    running = mover.stats()
    assert running is not None
    assert running.moving
    threads = threading.active_count()
    closing.set()
    mover.close()
    assert threading.active_count() == threads - 1
    stats = mover.stats()
    assert stats is not None
    assert not stats.moving
    assert stats.moved_bytes < whole_huge_pages(mapped.memory)
    assert stats.problem == "the engine was closed"
    assert np.array_equal(mapped.memory, content)
    mover.close()


def test_what_never_began_can_be_closed() -> None:
    mover = PageMover([])
    mover.start()
    mover.wait()
    mover.close()
    assert mover.stats() is None


def no_room(left_bytes: int, missing: int) -> MemoryRoom:
    return MemoryRoom(left_bytes + SPARE_BYTES - missing, 0)


def test_nothing_moves_without_room_for_all(tmp_path: Path, rng: np.random.Generator) -> None:
    write_file(tmp_path / "file", 8 * MIB, rng)
    mapped = map_file(tmp_path / "file")
    kv = 5 * MIB
    mover = PageMover([mapped], kv, room=lambda: no_room(8 * MIB + kv, missing=1), mode="madvise")
    mover.start()
    mover.wait()
    stats = mover.stats()
    assert stats is not None
    assert stats.moved_bytes == stats.cached_huge_bytes == 0
    assert "for 8 of weights, 5 of kv and 1074 to spare" in stats.problem
    assert counted(mapped.memory, "Rss") == 0, "what does not move is not read either"
    enough = PageMover([mapped], kv, room=lambda: no_room(8 * MIB + kv, missing=0))
    enough.start()
    enough.wait()
    need_huge_pages(enough)
    stats = enough.stats()
    assert stats is not None
    assert stats.moved_bytes > 0


def test_it_ends_where_others_take_the_memory(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_mover, "LOOK_EVERY", 4)
    content = write_file(tmp_path / "file", 64 * MIB, rng)
    mapped = map_file(tmp_path / "file")
    rooms = iter([AMPLE, AMPLE, MemoryRoom(SPARE_BYTES, 0)])
    mover = PageMover([mapped], room=lambda: next(rooms), mode="madvise")
    mover.start()
    mover.wait()
    stats = mover.stats()
    assert stats is not None
    assert "1074 MB of memory are available" in stats.problem
    assert stats.moved_bytes <= 8 * HUGE_PAGE_BYTES
    assert np.array_equal(mapped.memory, content)


def is_cached(path: Path, start: int) -> bool:
    """Whether the page cache has a byte (preadv2(2), RWF_NOWAIT)."""
    with path.open("rb", buffering=0) as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], start, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False


@pytest.fixture
def forgetful(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A directory whose files the system can be asked to forget."""
    path = tmp_path / "probe"
    write_file(path, MIB, rng)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        if is_cached(path, 0):
            pytest.skip("this file system keeps files in memory")
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this file system does not say what is in memory")
    return tmp_path


@pytest.mark.parametrize("scarce", [False, True])
def test_the_page_cache_is_left_to_the_next_start_while_memory_is_free(
    scarce: bool, forgetful: Path, rng: np.random.Generator
) -> None:
    path = forgetful / "file"
    content = write_file(path, 8 * MIB, rng)
    mapped = map_file(path)
    first = -mapped.memory.ctypes.data % HUGE_PAGE_BYTES
    room = MemoryRoom(1 << 50, SPARE_BYTES if scarce else 1 << 50)
    mover = PageMover([mapped], room=lambda: room)
    mover.start()
    mover.wait()
    need_huge_pages(mover)
    assert is_cached(path, first) is not scarce
    assert np.array_equal(mapped.memory, content)


def test_huge_pages_of_the_page_cache_stay(forgetful: Path, rng: np.random.Generator) -> None:
    path = forgetful / "file"
    content = write_file(path, 8 * MIB, rng)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = map_file(path, mmap.MADV_HUGEPAGE)
    mapped.memory.max()
    huge = counted(mapped.memory, "FilePmdMapped")
    if not huge:
        pytest.skip("this file system's files are not read into huge pages")
    mover = PageMover([mapped], room=lambda: AMPLE)
    mover.start()
    mover.wait()
    stats = mover.stats()
    assert stats is not None
    assert stats.cached_huge_bytes == huge == counted(mapped.memory, "FilePmdMapped")
    assert np.array_equal(mapped.memory, content)


def test_without_huge_pages_it_says_so_once(
    tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_file(tmp_path / "a", 8 * MIB, rng)
    write_file(tmp_path / "b", 8 * MIB, rng)
    mapped = [map_file(tmp_path / name) for name in "ab"]
    mover = PageMover(mapped, room=lambda: AMPLE, mode="never")
    mover.start()
    mover.wait()
    stats = mover.stats()
    assert stats is not None
    assert stats.moved_bytes == 0
    (line,) = caplog.messages
    assert line.endswith(
        "; the rest stays: the system gives no transparent huge pages; `moeserve doctor` tells how"
        " to have them"
    )


@pytest.mark.parametrize("most", [64, 3])
def test_a_system_without_free_huge_pages(
    most: int,
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces that would be no better than before stay where they are, and it gives up."""
    dropped = []

    def allocate(num_bytes: int) -> NDArray[np.uint8]:
        places = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE)
        places.madvise(mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(places, np.uint8)

    def drop_pages(pages: NDArray[np.uint8]) -> None:
        dropped.append(pages)
        _native.drop_pages(pages)

    content = write_file(tmp_path / "file", 17 * MIB, rng)
    mapped = map_file(tmp_path / "file")
    if _native.is_huge(mapped.memory[:4096]) is None:
        pytest.skip("this system does not tell what pages are huge")
    monkeypatch.setattr(page_mover, "allocate", allocate)
    monkeypatch.setattr(page_mover, "drop_pages", drop_pages)
    monkeypatch.setattr(page_mover, "MOST_REFUSALS", most)
    mover = PageMover([mapped], room=lambda: AMPLE, mode="madvise")
    mover.start()
    mover.wait()
    stats = mover.stats()
    assert stats is not None
    num_pieces = whole_huge_pages(mapped.memory) // HUGE_PAGE_BYTES
    assert len(dropped) == min(most, num_pieces)
    of_all = f"for {num_pieces} pieces of 2 MiB"
    assert stats.problem == f"the system had no huge page {of_all if most == 64 else '3 times'}"
    assert stats.moved_bytes == 0
    assert not any(pages.any() for pages in dropped), "no memory is kept for them"
    assert np.array_equal(mapped.memory, content)


def test_no_address_space_is_no_failure(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(num_bytes: int) -> NDArray[np.uint8]:
        return _native.allocate(num_bytes + (1 << 50))  # more than any system maps

    content = write_file(tmp_path / "file", 4 * MIB, rng)
    mapped = map_file(tmp_path / "file")
    monkeypatch.setattr(page_mover, "allocate", allocate)
    mover = PageMover([mapped], room=lambda: AMPLE, mode="madvise")
    mover.start()
    mover.wait()
    stats = mover.stats()
    assert stats is not None
    assert stats.problem == "no address space to read them into (ulimit -v)"
    assert np.array_equal(mapped.memory, content)


EXIT = """
import logging, mmap, sys, threading
from pathlib import Path
import numpy as np
from moeserve.cpu_backend.memory_room import MemoryRoom
from moeserve.models.open_file import OpenFile
from moeserve.models.page_mover import PageMover
from moeserve.models.safetensors_file import MappedFile

logging.basicConfig(level="INFO")
file = OpenFile(Path(sys.argv[1]))
mapping = mmap.mmap(file.handle, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
begun = threading.Event()

def busy():
    begun.set()
    threading.main_thread().join()  # the rest of the work comes when the interpreter goes away
    return True

mapped = MappedFile(file, np.frombuffer(mapping, np.uint8))
PageMover([mapped], is_busy=busy, room=lambda: MemoryRoom(1 << 50, 1 << 50), mode="madvise").start()
begun.wait()
"""


def test_a_process_that_ends_does_not_wait_for_it(tmp_path: Path, rng: np.random.Generator) -> None:
    write_file(tmp_path / "file", 16 * MIB, rng)
    done = subprocess.run(
        [sys.executable, "-c", EXIT, str(tmp_path / "file")],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the process ends" in done.stderr
