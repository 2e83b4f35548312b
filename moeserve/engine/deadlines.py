"""When requests must be ended, whatever state they are in."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

from moeserve.engine.sequence import Sequence


class Deadlines:
    """The deadlines of a scheduler's requests, in `time.time()` seconds.

    Names are kept, not sequences: those that finish in time need not be taken out, and cost little
    until their time has come.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []  # with the arrival: names are used again

    def watch(self, sequence: Sequence) -> None:
        deadline_s = sequence.request.deadline_s
        if deadline_s is not None:
            heapq.heappush(self._heap, (deadline_s, sequence.order[1], sequence.request_id))

    def passed(self, now_s: float, alive: Mapping[str, Sequence]) -> Iterator[Sequence]:
        """Those of `alive`, by request id, that did not finish by their deadline; each once."""
        while self._heap and self._heap[0][0] <= now_s:
            _, arrival, name = heapq.heappop(self._heap)
            sequence = alive.get(name)
            if sequence is not None and sequence.order[1] == arrival:
                yield sequence
