"""Sequences in one state, in the order in which they are served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from operator import attrgetter

from moeserve.engine.sequence import Sequence, SequenceState

_BY_ORDER = attrgetter("order")


class SequenceQueue(Collection[Sequence]):
    """The sequences of a scheduler that are in `state`, by (priority, arrival).

    Adding puts a sequence into the state; taking it out leaves that to whoever takes it.
    """

    def __init__(self, state: SequenceState) -> None:
        self._state = state
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._sequences

    def __getitem__(self, place: int) -> Sequence:
        return self._sequences[place]

    def add(self, sequence: Sequence) -> None:
        sequence.state = self._state
        insort(self._sequences, sequence, key=_BY_ORDER)

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[bisect_left(self._sequences, sequence.order, key=_BY_ORDER)]

    def in_turn(self, overtaking: int) -> Iterator[Sequence]:
        """The first, and those behind it that may start in its stead where it cannot, in order.

        They are of its priority, and no request is overtaken more than `overtaking` times. A
        preempted one is not overtaken at all: its reader has a part of the answer and waits.
        """
        for sequence in self._sequences[: overtaking + 1]:
            if sequence.order[0] != self._sequences[0].order[0]:
                return
            yield sequence
            if sequence.started_s is not None or sequence.num_overtaken >= overtaking:
                return

    def start(self, sequence: Sequence) -> None:
        """Takes out one that starts, and so overtakes all before it."""
        place = bisect_left(self._sequences, sequence.order, key=_BY_ORDER)
        for other in self._sequences[:place]:
            other.num_overtaken += 1
        del self._sequences[place]

    def pop_last(self) -> Sequence:
        return self._sequences.pop()

    def check_integrity(self) -> None:
        assert self._sequences == sorted(self._sequences, key=_BY_ORDER)
        assert all(sequence.state is self._state for sequence in self._sequences)
