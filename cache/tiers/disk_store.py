"""The disk tier: records of experts in files, read past the page cache.

The page cache would keep a second copy of what the host tier holds, and under a memory limit it
would push out the host tier itself, or be counted against it. O_DIRECT (open(2)) reads straight
into the slot; it wants files, offsets and memory in whole blocks, which packed records have.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from moeserve.cache.tiers.source import ExpertSource, RecordCheck, StoreError
from moeserve.core import ExpertKey

REPACK = "the files changed or are damaged: pack the model again with `moeserve pack`"


@dataclass(frozen=True)
class DiskRecord:
    """Bytes [start, start + num_bytes) of a file. checksum: xxh3_64 of them."""

    path: Path
    start: int
    num_bytes: int
    checksum: int


def checksum(data: memoryview) -> int:
    """xxh3_64: several times faster than a disk, and not meant against an attacker."""
    return xxhash.xxh3_64_intdigest(data)


class ChecksumCheck(RecordCheck):
    def __init__(self, key: ExpertKey, record: DiskRecord) -> None:
        self._key = key
        self._record = record
        self._sum = xxhash.xxh3_64()

    def update(self, piece: memoryview) -> None:
        self._sum.update(piece)

    def finish(self) -> None:
        expected, found = self._record.checksum, self._sum.intdigest()
        if found != expected:
            layer, expert = self._key
            raise StoreError(
                f"{self._record.path}: layer {layer}, expert {expert}: checksum"
                f" {expected:016x} expected, {found:016x} found",
                REPACK,
            )


class DiskStore(ExpertSource):
    """Reads records as they are wanted. `direct`: the page cache is left out of it."""

    def __init__(self, records: Mapping[ExpertKey, DiskRecord]) -> None:
        """Opens the files. Raises StoreError for one that cannot be opened or is too short."""
        self._records = dict(records)
        self._files: dict[Path, int] = {}
        self.direct = True
        ends: dict[Path, int] = {}
        for record in self._records.values():
            ends[record.path] = max(ends.get(record.path, 0), record.start + record.num_bytes)
        try:
            for path, end in ends.items():
                self._files[path] = self._open(path)
                _check_size(path, self._files[path], end)
        except StoreError:
            self.close()
            raise

    def num_bytes(self, key: ExpertKey) -> int:
        return self._records[key].num_bytes

    def keys(self) -> Iterable[ExpertKey]:
        return self._records.keys()

    def read(self, key: ExpertKey, start: int, into: memoryview) -> None:
        record = self._records[key]
        file, position, done = self._files[record.path], record.start + start, 0
        while done < len(into):
            count = os.preadv(file, [into[done:]], position + done)
            if count == 0:
                raise StoreError(
                    f"{record.path}: ends before byte {position + len(into)},"
                    f" within layer {key.layer}, expert {key.expert}",
                    REPACK,
                )
            done += count
        if not self.direct:
            os.posix_fadvise(file, position, len(into), os.POSIX_FADV_DONTNEED)

    def begin_check(self, key: ExpertKey) -> ChecksumCheck:
        return ChecksumCheck(key, self._records[key])

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which is how a file system says that it has no such
                raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
        self.direct = False
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error


def _check_size(path: Path, file: int, end: int) -> None:
    found = os.fstat(file).st_size
    if found < end:
        raise StoreError(f"{path}: {found} bytes, experts' records end at {end}", REPACK)
