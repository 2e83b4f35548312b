"""Figures of the disk: records by size and threads, as the disk tier reads them.

Where a read goes to counts: into slots, which lie on huge pages, a fifth more bytes arrive per
second than into pages of 4 KiB, because a request has fewer pieces. And who reads: of records of
256 KiB the tier's transfers bring 0.85 of what threads do that do nothing else, of 1 MiB 0.95.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moeserve.cache.tiers.disk_store import (
    ChecksumCheck,
    DiskRecord,
    DiskStore,
    FileState,
    UnchangedCheck,
)
from moeserve.cache.tiers.disk_tuning import read_rate
from moeserve.cache.tiers.host_slots import HostSlots
from moeserve.cache.tiers.source import RecordCheck
from moeserve.cache.transfer import Transfers
from moeserve.cache.types import Load
from moeserve.core import ConfigError, ExpertKey
from moeserve.experts.disk_tier import CHUNK_BYTES
from moeserve.experts.schedule.profile import DiskPoint
from moeserve.planner.repeats import Repeats, lasting

WRITE_BYTES = 4 << 20
#: memory that is read into, in turn: what a processor's cache holds is another's business
TARGET_BYTES = 64 << 20


@dataclass(frozen=True)
class DiskPlan:
    """file_bytes: of the temporary file. block_bytes: of the records. queue_depths: threads.
    sample_bytes: read for one sample, at least one record for every thread."""

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
    directory = _writable(plan.directory)
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".calibrate-") as folder:
            path = Path(folder) / "blocks"
            _write(path, plan.file_bytes)
            return measure_file(plan, path, report)
    except OSError as error:
        raise ConfigError(
            f"disk_dir: {plan.file_bytes >> 20} MiB in {directory}: {error.strerror}",
            field="disk_dir",
            hint="name a directory with room for them, or give --no-disk",
        ) from error


def measure_file(
    plan: DiskPlan, path: Path, report: Callable[[str], None] = lambda text: None
) -> list[DiskPoint]:
    """Of reads from a file that is there. Raises ConfigError where its file system has no O_DIRECT.

    What varies is the disk's own, and steps wait for all of it: a rate is that of its samples
    together.
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
            lasting(
                partial(
                    stack.enter_context(RecordReader(path, block, depth)).bytes_per_s,
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


class RecordReader:
    """Reads records of a file at random places as the disk tier does: by its transfers, with so
    many threads, into slots."""

    def __init__(self, path: Path, record_bytes: int, num_threads: int) -> None:
        """Raises ConfigError where the file system of the file has no O_DIRECT."""
        self._record_bytes = record_bytes
        count = path.stat().st_size // record_bytes
        self._store = _SeenStore(
            {
                ExpertKey(0, n): DiskRecord(path, n * record_bytes, record_bytes, 0)
                for n in range(count)
            }
        )
        if not self._store.direct:
            self._store.close()
            raise ConfigError(
                f"disk_dir: the file system of {path.parent.parent} has no O_DIRECT",
                field="disk_dir",
                hint="name a directory on the disk that the model lies on",
            )
        self._keys = list(self._store.keys())
        slots = HostSlots(record_bytes, max(2 * num_threads, TARGET_BYTES // record_bytes))
        self._num_slots = len(slots)
        self._transfers = Transfers(self._store, slots.__getitem__, num_threads, CHUNK_BYTES)

    def bytes_per_s(self, num_records: int) -> float:
        """Of so many records that are ordered together, from when they are."""
        keys = random.sample(self._keys, min(num_records, self._num_slots, len(self._keys)))
        loads = [Load(key, slot) for slot, key in enumerate(keys)]
        return read_rate(self._transfers, loads, len(keys) * self._record_bytes)

    def __enter__(self) -> RecordReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._transfers.close()
        self._store.close()


class _SeenStore(DiskStore):
    """Of records that were read before and were right, as nearly all are that a tier reads."""

    def begin_check(self, key: ExpertKey) -> RecordCheck:
        record = self._records[key]
        state = FileState.of(self._files[record.path])
        assert state is not None, "the system says what a file that was just opened is"
        return UnchangedCheck(ChecksumCheck(key, record), partial(self._is_still, key, state))
