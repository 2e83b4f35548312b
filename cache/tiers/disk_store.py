"""The disk tier: records of experts in files, read past the page cache.

The page cache would keep a second copy of what the host tier holds, and under a memory limit it
would push out the host tier itself, or be counted against it. O_DIRECT (open(2)) reads straight
into the slot; it wants files, offsets and memory in whole blocks, which packed records have.

A record is summed up when it is read for the first time, and again when its file has changed since:
what was right and has not been written is right. (Summing every arrival takes a tenth of the
processor's time where experts come and go; what it would find besides is a disk that returns other
bytes than before and reports no error.)
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import xxhash

from moeserve.cache.tiers.source import ExpertSource, RecordCheck, StoreError
from moeserve.core import ExpertKey

#: a file written so shortly ago could be written again without showing it: times on files are
#: coarse (as git has it with its index)
RACY_NS = 2_000_000_000
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


class FileState(NamedTuple):
    """What the system says of a file; another one after every change that it knows of."""

    num_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: int) -> FileState | None:
        """None where the system does not say: the file may have changed."""
        try:
            found = os.fstat(file)
        except OSError:  # as of a server that is gone; reading it says what is wrong
            return None
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @property
    def is_racy(self) -> bool:
        return max(self.modified_ns, self.changed_ns) > time.time_ns() - RACY_NS


class ChecksumCheck(RecordCheck):
    def __init__(
        self, key: ExpertKey, record: DiskRecord, is_right: Callable[[], None] = lambda: None
    ) -> None:
        """is_right: told when the sum was as expected."""
        self._key = key
        self._record = record
        self._is_right = is_right
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
        self._is_right()


class UnchangedCheck(RecordCheck):
    """Of a record that was right: summed up only if the file changes before all of it is read."""

    def __init__(self, check: ChecksumCheck, is_unchanged: Callable[[], bool]) -> None:
        self._check = check
        self._is_unchanged = is_unchanged
        self._pieces: list[memoryview] = []

    def update(self, piece: memoryview) -> None:
        self._pieces.append(piece)

    def finish(self) -> None:
        if self._is_unchanged():
            return
        for piece in self._pieces:
            self._check.update(piece)
        self._check.finish()


class DiskStore(ExpertSource):
    """Reads records as they are wanted. `direct`: the page cache is left out of it."""

    def __init__(self, records: Mapping[ExpertKey, DiskRecord]) -> None:
        """Opens the files. Raises StoreError for one that cannot be opened or is too short."""
        self._records = dict(records)
        self._files: dict[Path, int] = {}
        self._right: dict[ExpertKey, FileState] = {}  # what the file was before it was read
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

    def begin_check(self, key: ExpertKey) -> RecordCheck:
        """Before the first byte is read."""
        record = self._records[key]
        state = FileState.of(self._files[record.path])
        if state is not None and self._right.get(key) == state:
            return UnchangedCheck(ChecksumCheck(key, record), partial(self._is_still, key, state))
        self._right.pop(key, None)
        if state is None or state.is_racy:
            return ChecksumCheck(key, record)
        return ChecksumCheck(key, record, partial(self._right.__setitem__, key, state))

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _is_still(self, key: ExpertKey, state: FileState) -> bool:
        return FileState.of(self._files[self._records[key].path]) == state

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
