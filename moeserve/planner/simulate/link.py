"""One link on a simulated clock: to the device, or from the disk."""

from __future__ import annotations

from collections.abc import Sequence

from moeserve.cache.expert_cache import ExpertCache
from moeserve.cache.types import Load
from moeserve.core import ExpertKey


class SimulatedLink:
    """One transfer at a time into a cache; prefetches move in their order whenever no demand does.

    now_us: up to when it has moved what there was. busy_us: for how long it moved anything.
    """

    def __init__(self, cache: ExpertCache, fetch_us: float) -> None:
        """fetch_us: of one expert."""
        self._cache = cache
        self._fetch_us = fetch_us
        self._waiting: dict[ExpertKey, float] = {}  # prefetches and what is left of each
        self._clock_us = 0.0  # demands may fill the timeline ahead of it
        self.now_us = 0.0
        self.busy_us = 0.0

    def begin(self, loads: Sequence[Load]) -> None:
        """Prefetches, behind those that are there."""
        for load in loads:
            self._waiting[load.key] = self._fetch_us

    def advance(self, to_us: float) -> None:
        """Moves prefetches up to that time."""
        self._clock_us = to_us
        for key in list(self._waiting):
            moved_us = min(self._waiting[key], to_us - self.now_us)
            if moved_us <= 0:
                break
            self.now_us += moved_us
            self.busy_us += moved_us
            self._waiting[key] -= moved_us
            if self._waiting[key] <= 0:
                del self._waiting[key]
                self._cache.complete(key)
        self.now_us = max(self.now_us, to_us)

    def cancel(self) -> None:
        """Calls off the prefetches that have not begun."""
        begun = {key: us for key, us in self._waiting.items() if us < self._fetch_us}
        for key in self._waiting.keys() - begun.keys():
            self._cache.abandon(key)
        self._waiting = begun

    def finish(self) -> None:
        """Waits for the prefetches that are under way."""
        self.advance(self.now_us + sum(self._waiting.values()))

    def left_us(self) -> float:
        """Until everything that was ordered has moved, from the time it was last advanced to."""
        return self.now_us - self._clock_us + sum(self._waiting.values())

    def loading(self, layer: int) -> dict[int, float]:
        """Experts of a layer that are under way, and what is left of each."""
        return {key.expert: us for key, us in self._waiting.items() if key.layer == layer}

    def demand(
        self,
        keys: Sequence[ExpertKey],
        fetch_us: float | None = None,
        there_us: Sequence[float] = (),
    ) -> list[float]:
        """Moves them now, in order; when each has arrived. What is under way is finished.

        fetch_us: of each, where that is not as usual. there_us: from when on each can be moved.
        """
        arrivals = []
        for place, key in enumerate(keys):
            usual_us = self._fetch_us if fetch_us is None else fetch_us
            left_us = self._waiting.pop(key, usual_us)
            begins_us = max(self.now_us, there_us[place] if there_us else 0.0)
            self.now_us = begins_us + left_us
            self.busy_us += left_us
            arrivals.append(self.now_us)
            self._cache.complete(key)
        return arrivals
