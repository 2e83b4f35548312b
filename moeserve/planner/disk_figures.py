"""Figures of the disk: O_DIRECT reads by block size and depth, as the disk tier makes them.

Where a read goes to counts: into slots, which lie on huge pages, a fifth more bytes arrive per
second than into pages of 4 KiB, because a request has fewer pieces.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moeserve.cache.tiers.host_slots import HostSlots
from moeserve.core import ConfigError
from moeserve.experts.schedule.profile import DiskPoint
from moeserve.planner.repeats import Repeats, usual

WRITE_BYTES = 4 << 20
#: memory that is read into, in turn: what a processor's cache holds is another's business
TARGET_BYTES = 64 << 20


@dataclass(frozen=True)
class DiskPlan:
    """file_bytes: of the temporary file. sample_bytes: read for one sample, at least one block for
    every read in flight."""

    directory: Path
    file_bytes: int
    block_bytes: tuple[int, ...]
    queue_depths: tuple[int, ...]
    sample_bytes: int
    repeats: Repeats


def measure_disk(plan: DiskPlan, report: Callable[[str], None]) -> list[DiskPoint]:
    """Writes a file into plan.directory, reads from it past the page cache, removes it.

    Raises ConfigError where the directory cannot be written to, or its file system has no O_DIRECT.
    """
    report(f"disk: writing {plan.file_bytes >> 20} MiB into {plan.directory}")
    with tempfile.TemporaryDirectory(dir=_writable(plan.directory), prefix=".calibrate-") as folder:
        path = Path(folder) / "blocks"
        _write(path, plan.file_bytes)
        return measure_file(plan, path, report)


def measure_file(
    plan: DiskPlan, path: Path, report: Callable[[str], None] = lambda text: None
) -> list[DiskPoint]:
    """Of reads from a file that is there. Raises ConfigError where its file system has no O_DIRECT.

    What varies is the disk's own, so a rate is the middle of its samples.
    """
    points: list[DiskPoint] = []
    for block in plan.block_bytes:
        report(f"disk: blocks of {block >> 10} KiB")
        points += _points(plan, path, block)
    return points


def _writable(directory: Path) -> Path:
    if not os.access(directory, os.W_OK):
        raise ConfigError(
            f"disk_dir: {directory} is no directory that can be written to", field="disk_dir"
        )
    return directory


def _write(path: Path, num_bytes: int) -> None:
    """Random bytes: some disks and file systems store zeros and repetitions as less."""
    with path.open("wb") as file:
        for _ in range(num_bytes // WRITE_BYTES):
            file.write(random.randbytes(WRITE_BYTES))
        file.flush()
        os.fsync(file.fileno())


def _points(plan: DiskPlan, path: Path, block: int) -> list[DiskPoint]:
    """Of one block size by depth, which take turns."""
    with ExitStack() as stack:
        wanted = [
            usual(
                partial(
                    stack.enter_context(DirectReader(path, block, depth)).bytes_per_s,
                    max(depth, plan.sample_bytes // block),
                )
            )
            for depth in plan.queue_depths
        ]
        rates = plan.repeats.measure(wanted)
    return [
        DiskPoint(block_bytes=block, queue_depth=depth, bytes_per_s=rate)
        for depth, rate in zip(plan.queue_depths, rates, strict=True)
    ]


class DirectReader:
    """`depth` threads that read blocks of a file at random places into slots, the next free thread
    the next block, as `Transfers` does."""

    def __init__(self, path: Path, block_bytes: int, depth: int) -> None:
        self._block_bytes = block_bytes
        self._num_blocks = path.stat().st_size // block_bytes
        self._depth = depth
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            raise ConfigError(
                f"disk_dir: the file system of {path.parent.parent} has no O_DIRECT:"
                f" {error.strerror}",
                field="disk_dir",
                hint="name a directory on the disk that the model lies on",
            ) from error
        self._slots = HostSlots(block_bytes, max(2 * depth, TARGET_BYTES // block_bytes))
        self._threads = ThreadPoolExecutor(depth)

    def fileno(self) -> int:
        return self._file

    def bytes_per_s(self, num_blocks: int) -> float:
        """Of num_blocks reads together."""
        places = [random.randrange(self._num_blocks) for _ in range(num_blocks)]
        jobs = iter([(place, rank % len(self._slots)) for rank, place in enumerate(places)])
        started_s = time.perf_counter()
        list(self._threads.map(self._read, [jobs] * self._depth))
        return num_blocks * self._block_bytes / (time.perf_counter() - started_s)

    def _read(self, jobs: Iterator[tuple[int, int]]) -> None:
        for place, slot in jobs:  # one list's iterator for all threads: each job goes to one
            done = os.preadv(self._file, [self._slots[slot].data], place * self._block_bytes)
            assert done == self._block_bytes, "a block within the file is read whole"

    def __enter__(self) -> DirectReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        os.close(self._file)
