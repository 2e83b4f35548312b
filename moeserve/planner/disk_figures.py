"""Figures of the disk: O_DIRECT reads by block size and depth, as the disk tier makes them."""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moeserve.core import ConfigError
from moeserve.experts.schedule.profile import DiskPoint
from moeserve.planner.repeats import Repeats, rated

WRITE_BYTES = 4 << 20


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
            rated(
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
    """`depth` threads that read blocks of a file at random places, each into memory of its own."""

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
        self._buffers = [mmap.mmap(-1, block_bytes) for _ in range(depth)]  # page-aligned
        self._threads = ThreadPoolExecutor(depth)

    def fileno(self) -> int:
        return self._file

    def bytes_per_s(self, num_blocks: int) -> float:
        """Of num_blocks reads together."""
        places = [random.randrange(self._num_blocks) for _ in range(num_blocks)]
        shares = [places[i :: self._depth] for i in range(self._depth)]
        started_s = time.perf_counter()
        list(self._threads.map(self._read, self._buffers, shares))
        return num_blocks * self._block_bytes / (time.perf_counter() - started_s)

    def _read(self, buffer: mmap.mmap, places: list[int]) -> None:
        for place in places:
            done = os.preadv(self._file, [buffer], place * self._block_bytes)
            assert done == self._block_bytes, "a block within the file is read whole"

    def __enter__(self) -> DirectReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        os.close(self._file)
        for buffer in self._buffers:
            buffer.close()
