"""The slot numbers of one tier: which are free, and how the tier grows and shrinks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


class SlotPool:
    """Free slots, lowest number first. Owed: slots in use beyond a capacity made smaller."""

    def __init__(self, num_slots: int) -> None:
        self.capacity = num_slots
        self.num_owed = 0
        self._free = list(range(num_slots))  # a heap
        self._end = num_slots  # every number below it has been a slot
        self._retired: list[int] = []  # a heap of numbers below _end that are none now
        self._given_up: list[int] = []  # retired and not yet told

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return heapq.heappop(self._free)

    def give(self, slot: int) -> None:
        """A slot comes back: it is free, or gone if slots are owed."""
        if self.num_owed:
            self.num_owed -= 1
            self._retire(slot)
        else:
            heapq.heappush(self._free, slot)

    def resize(self, capacity: int) -> tuple[int, ...]:
        """The numbers added. Free slots are given up at once, the others are owed.

        A number that was given up and not yet told of comes back without being told at all.
        """
        change = capacity - self.capacity
        self.capacity = capacity
        if change < 0:
            staying = max(0, len(self._free) + change)
            self._free.sort()  # a sorted list is a heap
            self._free, going = self._free[:staying], self._free[staying:]
            for slot in going:
                self._retire(slot)
            self.num_owed += -change - len(going)
            return ()
        forgiven = min(self.num_owed, change)
        self.num_owed -= forgiven
        untold, self._given_up = set(self._given_up), []
        added = [self._new() for _ in range(change - forgiven)]
        for slot in added:
            heapq.heappush(self._free, slot)
        self._given_up = sorted(untold.difference(added))
        return tuple(slot for slot in added if slot not in untold)

    def take_given_up(self) -> tuple[int, ...]:
        given_up, self._given_up = tuple(self._given_up), []
        return given_up

    def _retire(self, slot: int) -> None:
        heapq.heappush(self._retired, slot)
        self._given_up.append(slot)

    def _new(self) -> int:
        if self._retired:
            return heapq.heappop(self._retired)
        self._end += 1
        return self._end - 1

    def check_integrity(self, held: Sequence[int]) -> None:
        """held: slots that experts stand in. AssertionError where a number is lost or doubled."""
        numbers = sorted([*held, *self._free, *self._retired])
        assert numbers == list(range(self._end)), "a slot lost or doubled"
        assert len(held) + len(self._free) == self.capacity + self.num_owed, "capacity miscounted"
        assert not (self.num_owed and self._free), "a free slot although some are owed"
