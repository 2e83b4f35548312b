"""The memory of the host tier's slots."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

#: slots are taken from the system in regions of about this size: small records share huge pages
REGION_BYTES = 64 << 20


class HostSlots:
    """Slots of equal size, page-aligned, numbered from 0. Pages count once they were written."""

    def __init__(self, slot_bytes: int, num_slots: int) -> None:
        """slot_bytes: rounded up to whole pages."""
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._per_region = max(1, REGION_BYTES // self.slot_bytes)
        self._regions: list[mmap.mmap] = []
        self._slots: list[Bytes] = []
        self.grow(num_slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> Bytes:
        """[slot_bytes] uint8."""
        return self._slots[slot]

    def grow(self, num_slots: int) -> None:
        """Makes sure that there are at least so many slots. MemoryError: there is no room."""
        while len(self._slots) < num_slots:
            region = self._map(self._per_region * self.slot_bytes)
            self._regions.append(region)
            whole = np.frombuffer(region, dtype=np.uint8)
            self._slots.extend(whole.reshape(self._per_region, self.slot_bytes))

    def give_back(self, slot: int) -> None:
        """Returns the slot's pages to the system, until `take_back`.

        Linux would else fill the hole beside a slot in use with a huge page again (khugepaged;
        max_ptes_none is 511 by default).
        """
        self._advise(slot, mmap.MADV_DONTNEED)
        with contextlib.suppress(OSError):  # as in _map
            self._advise(slot, mmap.MADV_NOHUGEPAGE)

    def take_back(self, slot: int) -> None:
        """The slot is to be written again."""
        with contextlib.suppress(OSError):
            self._advise(slot, mmap.MADV_HUGEPAGE)

    def _advise(self, slot: int, advice: int) -> None:
        region, place = divmod(slot, self._per_region)
        self._regions[region].madvise(advice, place * self.slot_bytes, self.slot_bytes)

    @staticmethod
    def _map(num_bytes: int) -> mmap.mmap:
        try:
            region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no {num_bytes} bytes for slots of experts") from error
        try:
            region.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            return region  # a kernel without huge pages: small ones do the same, slower
        return region
