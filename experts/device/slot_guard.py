"""Watches over slots beside an emulated device: who wrote them, who reads them, and when.

One stands over the device's slots, and one over those of the host where experts come from disk.
The order in which slots may be used is kept by the caches and their leases. On a real device a
mistake there shows as wrong numbers, some day; here every use is written down with its time, and
the first that contradicts another raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from moeserve.core import ExpertKey


class SlotConflict(AssertionError):
    """A slot was read while it was written, or written while it was read: a mistake of ours."""


@dataclass
class _Slot:
    """written_us: when `key` was complete in it, inf before. read_until_us: end of the last read
    that is known of, which may lie ahead."""

    key: ExpertKey
    written_us: float = inf
    read_until_us: float = 0.0


class SlotGuard:
    """Told of every write and read of a slot with its times; raises SlotConflict (DESIGN,
    invariant 3: a slot is reused only after the event of its last reader has fired)."""

    def __init__(self) -> None:
        self._slots: dict[int, _Slot] = {}

    def write_begins(self, slot: int, key: ExpertKey, us: float) -> None:
        """From now on the slot holds nothing, until `write_ends`."""
        known = self._slots.get(slot)
        if known is not None and us < known.read_until_us:
            raise SlotConflict(
                f"slot {slot} is written for {key} from {us:.3f} us on, while {known.key} is read"
                f" from it until {known.read_until_us:.3f} us"
            )
        self._slots[slot] = _Slot(key)

    def write_ends(self, slot: int, key: ExpertKey, us: float) -> None:
        known = self._slots.get(slot)
        if known is None or known.key != key:
            held = "nothing" if known is None else known.key
            raise SlotConflict(f"the end of writing {key} to slot {slot}, where {held} is written")
        known.written_us = us

    def read(self, slot: int, key: ExpertKey, start_us: float, end_us: float) -> None:
        known = self._complete(slot, key, start_us)
        known.read_until_us = max(known.read_until_us, end_us)

    def read_begins(self, slot: int, key: ExpertKey, us: float) -> None:
        """A read whose end nobody knows yet; one at a time for a slot, `read_ends` says when."""
        self._complete(slot, key, us).read_until_us = inf

    def read_ends(self, slot: int, key: ExpertKey, us: float) -> None:
        self._complete(slot, key, us).read_until_us = us

    def _complete(self, slot: int, key: ExpertKey, us: float) -> _Slot:
        """Raises SlotConflict unless the slot holds the expert, as a whole, at that time."""
        known = self._slots.get(slot)
        if known is None or known.key != key:
            held = "nothing" if known is None else known.key
            raise SlotConflict(f"slot {slot} is read for {key} and holds {held}")
        if us < known.written_us:
            raise SlotConflict(
                f"slot {slot} is read for {key} from {us:.3f} us on, and written until"
                f" {known.written_us:.3f} us"
            )
        return known
