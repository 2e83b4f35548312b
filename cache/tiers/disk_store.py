"""The disk tier: records of experts in files, read past the page cache.

The page cache would keep a second copy of what the host tier holds, and under a memory limit it
would push out the host tier itself, or be counted against it. O_DIRECT (open(2)) reads straight
into the slot; it wants files, offsets and memory in whole blocks, which packed records have.

A record is summed up when it is read for the first time, and again when its file has changed since:
what was right and has not been written is right. (Summing every arrival takes a tenth of the
processor's time where experts come and go; what it would find besides is a disk that returns other
bytes than before and reports no error.)

A file stays open, so whoever renames another over it, or deletes it, harms nobody. Only where a
record cannot be read from it is it looked at what its path names by now: who mends a model puts a
whole file there.
"""

from __future__ import annotations

import errno
import logging
import mmap
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

logger = logging.getLogger(__name__)

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
    device: int
    inode: int

    @classmethod
    def of(cls, file: int) -> FileState | None:
        """None where the system does not say: the file may have changed."""
        try:
            found = os.fstat(file)
        except OSError:  # as of a server that is gone; reading it says what is wrong
            return None
        times = found.st_mtime_ns, found.st_ctime_ns
        return cls(found.st_size, *times, found.st_dev, found.st_ino)

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
        self._doubted: set[ExpertKey] = set()
        self.direct = True
        self._ends: dict[Path, int] = {}
        for record in self._records.values():
            end = record.start + record.num_bytes
            self._ends[record.path] = max(self._ends.get(record.path, 0), end)
        try:
            for path, end in self._ends.items():
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
        file, position = self._files[record.path], record.start + start
        if not _read_all(file, position, into):
            raise StoreError(
                f"{record.path}: ends before byte {position + len(into)},"
                f" within layer {key.layer}, expert {key.expert}",
                REPACK,
            )
        if not self.direct:
            os.posix_fadvise(file, position, len(into), os.POSIX_FADV_DONTNEED)

    def begin_check(self, key: ExpertKey) -> RecordCheck:
        """Before the first byte is read."""
        record = self._records[key]
        if key in self._doubted:
            self._doubted.discard(key)
            self._reopen(key)
        state = FileState.of(self._files[record.path])
        if state is not None and self._right.get(key) == state:
            return UnchangedCheck(ChecksumCheck(key, record), partial(self._is_still, key, state))
        self._right.pop(key, None)
        if state is None or state.is_racy:
            return ChecksumCheck(key, record)
        return ChecksumCheck(key, record, partial(self._right.__setitem__, key, state))

    def doubt(self, key: ExpertKey) -> None:
        """The record could not be read, or was wrong: before it is read again, it is looked for in
        the file that its path names by then."""
        self._doubted.add(key)

    def verify(self, key: ExpertKey) -> None:
        """Reads the record into memory of its own. StoreError where it cannot be read as it was
        stored, OSError as in `read`."""
        check = self.begin_check(key)
        with mmap.mmap(-1, self.num_bytes(key)) as memory, memoryview(memory) as record:
            self.read(key, 0, record)
            check.update(record)
            check.finish()

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _reopen(self, key: ExpertKey) -> None:
        """Reads from the file that the path names now, if that is another one and has the record as
        it was stored: else the one that is open may still have others."""
        record = self._records[key]
        try:
            new = self._open(record.path)
        except StoreError:
            return
        try:
            before, now = FileState.of(self._files[record.path]), FileState.of(new)
            if now is None or (before is not None and before[-2:] == now[-2:]):
                return
            if now.num_bytes >= self._ends[record.path] and _holds(new, record):
                # Whoever reads at this moment does so to the end from one of the two files.
                os.dup2(new, self._files[record.path], inheritable=False)
                logger.warning("%s: is another file now, and read from there", record.path)
        finally:
            os.close(new)

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


def _read_all(file: int, position: int, into: memoryview) -> bool:
    """Whether the file is long enough."""
    done = 0
    while done < len(into):
        count = os.preadv(file, [into[done:]], position + done)
        if count == 0:
            return False
        done += count
    return True


def _holds(file: int, record: DiskRecord) -> bool:
    """Whether the record stands there as it was stored."""
    with mmap.mmap(-1, record.num_bytes) as memory, memoryview(memory) as found:
        try:
            return _read_all(file, record.start, found) and checksum(found) == record.checksum
        except OSError:
            return False


def _check_size(path: Path, file: int, end: int) -> None:
    found = os.fstat(file).st_size
    if found < end:
        raise StoreError(f"{path}: {found} bytes, experts' records end at {end}", REPACK)
