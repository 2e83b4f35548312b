"""One record on its way into a slot: what is handed out, what has arrived, what is checked.

Pieces arrive in any order, a checksum is taken in order. Whoever brings the piece that comes next
goes on with the checksum, through everything that has arrived behind it; so the sum is nearly done
when the last piece arrives, and most bytes are summed while they are still in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from math import ceil

from moeserve.cache.tiers.source import RecordCheck, RecordMemory, StoreError
from moeserve.cache.types import Load

#: chunks begin at multiples of it: blocks of files, pages of memory
ALIGNMENT = 4096


class Urgency(IntEnum):
    DEMAND = 0
    PREFETCH = 1


@dataclass(eq=False)
class RecordCopy:
    """All but `check_piece` is for one thread at a time, which the owner's lock sees to.

    given: bytes handed to threads. num_reading: threads at it.
    """

    load: Load
    urgency: Urgency
    record: RecordMemory
    check: RecordCheck
    begun_s: float
    given: int = 0
    num_reading: int = 0
    error: StoreError | None = None
    _checked: int = 0
    _checking: bool = False
    _arrived: dict[int, int] = field(default_factory=dict)  # start to stop, still unchecked

    @property
    def all_given(self) -> bool:
        return self.given == len(self.record)

    @property
    def complete(self) -> bool:
        """Whole and checked, or failed; and no thread is at it, nor will be."""
        if self.num_reading or self._checking:
            return False
        return self.error is not None or self._checked == len(self.record)

    def take(self, num_bytes: int) -> tuple[int, int]:
        """The next bytes to be read, [start, stop)."""
        start = self.given
        self.given = min(start + num_bytes, len(self.record))
        self.num_reading += 1
        return start, self.given

    def arrived(self, start: int, stop: int, error: StoreError | None) -> None:
        """What `take` gave has been read, or not; the first error stays."""
        self.num_reading -= 1
        self.error = self.error or error
        self._arrived[start] = stop

    def take_piece(self) -> tuple[int, int] | None:
        """What the checksum goes on with, to be handed to `check_piece` and then to `checked`.
        None: what comes next is not there, or another thread is at it."""
        if self._checking or self.error is not None:
            return None
        start = stop = self._checked
        while stop in self._arrived:
            stop = self._arrived.pop(stop)
        if start == stop:
            return None
        self._checking = True
        return start, stop

    def check_piece(self, start: int, stop: int) -> StoreError | None:
        """Takes the sum; of the last piece, says whether it is the right one."""
        self.check.update(self.record[start:stop])
        if stop < len(self.record):
            return None
        try:
            self.check.finish()
        except StoreError as error:
            return error
        return None

    def checked(self, stop: int, error: StoreError | None) -> None:
        self._checking = False
        self._checked = stop
        self.error = self.error or error


def num_chunks(record_bytes: int, about_bytes: int) -> int:
    """Into how many equal chunks a record goes that are to be about so long. A short rest would be
    a request of its own, and those cost the disk time too."""
    return max(1, round(record_bytes / about_bytes))


def equal_chunk(record_bytes: int, about_bytes: int) -> int:
    """Bytes of each of these chunks; the last may be shorter."""
    each = record_bytes / num_chunks(record_bytes, about_bytes)
    return ceil(each / ALIGNMENT) * ALIGNMENT
