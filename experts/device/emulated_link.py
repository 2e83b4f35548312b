"""An emulated link, to a device or from a disk: one copy at a time, what a step waits for before
guesses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeserve.cache.transfer_stats import TransferStats
from moeserve.cache.types import Load
from moeserve.core import ExpertKey
from moeserve.timeline import Timeline

#: the process of a timeline that goes by the emulated clock
EMULATED = "emulated device, in its own time"
#: told of a slot that begins or ends to be written, and the time
Written = Callable[[Load, float], None]


@dataclass(eq=False)
class _Copy:
    load: Load
    num_bytes: int
    us: float
    left_us: float
    demanded: bool = False

    @property
    def begun(self) -> bool:
        return self.left_us < self.us


class EmulatedLink:
    """A timeline of copies. Prefetches move in their order whenever no demand does; a demand stops
    the prefetch that is running, which goes on behind it (chunks are small beside a record)."""

    def __init__(
        self,
        begins: Written,
        ends: Written,
        timeline: Timeline | None = None,
        names: tuple[str, str] = ("copy", "link"),
    ) -> None:
        """names: of a transfer and of its row, on the timeline."""
        self.stats = TransferStats()
        self._timeline = timeline or Timeline()
        self._names = names
        self._begins = begins
        self._ends = ends
        self._now_us = 0.0  # how far the timeline is filled; demands may fill it ahead of the clock
        self._waiting: dict[ExpertKey, _Copy] = {}  # prefetches
        self._arrivals: dict[ExpertKey, tuple[float, Load]] = {}

    @property
    def num_active(self) -> int:
        """Copies that nobody has been told of as finished."""
        return len(self._waiting) + len(self._arrivals)

    def prefetch(self, load: Load, num_bytes: int, us: float) -> None:
        """us: how long the copy takes by itself."""
        assert load.key not in self._waiting, f"{load.key} is on its way already"
        assert us > 0, f"{load.key}: a copy that takes no time"
        self._waiting[load.key] = _Copy(load, num_bytes, us, us)
        self.stats.num_prefetches += 1

    def demand(self, load: Load, num_bytes: int, us: float, now_us: float) -> None:
        """Copies it before any prefetch, behind demands that were there."""
        self.advance(now_us)
        self.stats.num_demands += 1
        self._finish(_Copy(load, num_bytes, us, us, demanded=True))

    def promote(self, key: ExpertKey, now_us: float) -> None:
        """A prefetch that a step now waits for becomes a demand, if it is not there yet."""
        self.advance(now_us)
        copy = self._waiting.pop(key, None)
        if copy is not None:
            copy.demanded = True
            self.stats.num_promoted += 1
            self._finish(copy)

    def cancel_prefetches(self) -> list[Load]:
        """Calls off those of which nothing was copied yet; their slots are as they were."""
        called_off = [copy.load for copy in self._waiting.values() if not copy.begun]
        for load in called_off:
            del self._waiting[load.key]
        return called_off

    def advance(self, to_us: float) -> None:
        """Moves prefetches up to that time."""
        for copy in list(self._waiting.values()):
            # by its end, as next_end_us says it: a difference would leave what is lost in rounding
            ends = self._now_us + copy.left_us <= to_us
            moved_us = copy.left_us if ends else to_us - self._now_us
            if moved_us <= 0:
                break
            self._move(copy, moved_us)
            if not copy.left_us:
                del self._waiting[copy.load.key]
        self._now_us = max(self._now_us, to_us)

    def finished(self, now_us: float) -> list[Load]:
        """What has arrived by now, in its order; each is told once."""
        self.advance(now_us)
        loads = [load for us, load in self._arrivals.values() if us <= now_us]
        for load in loads:
            del self._arrivals[load.key]
        return loads

    def arrives_us(self, key: ExpertKey) -> float:
        """When a demand will be, or was, complete; 0 where it was told as finished before."""
        return self._arrivals[key][0] if key in self._arrivals else 0.0

    def next_end_us(self, now_us: float) -> float | None:
        """When the next copy will be complete, if no other is ordered; None: there is none."""
        self.advance(now_us)
        if self._arrivals:
            return min(us for us, _ in self._arrivals.values())
        left_us = [copy.left_us for copy in self._waiting.values()]
        return self._now_us + left_us[0] if left_us else None

    def keys(self) -> set[ExpertKey]:
        """Experts whose copies nobody has been told of as finished."""
        return self._waiting.keys() | self._arrivals.keys()

    def left_us(self, layer: int) -> dict[int, float]:
        """Experts of a layer that are being prefetched, and what is left of each copy."""
        return {
            key.expert: copy.left_us for key, copy in self._waiting.items() if key.layer == layer
        }

    def all_left_us(self, now_us: float) -> float:
        """Until everything that was ordered has moved, if no more is."""
        self.advance(now_us)
        return self._now_us - now_us + sum(copy.left_us for copy in self._waiting.values())

    def _finish(self, copy: _Copy) -> None:
        self._move(copy, copy.left_us)

    def _move(self, copy: _Copy, us: float) -> None:
        load = copy.load
        if not copy.begun:
            self._begins(load, self._now_us)
        start_s, self._now_us = self._now_us / 1e6, self._now_us + us
        urgency = "demand" if copy.demanded else "prefetch"
        about = {"urgency": urgency, **load.key._asdict()}
        self._timeline.add(*self._names, start_s, self._now_us / 1e6, EMULATED, **about)
        copy.left_us -= us
        if not copy.left_us:
            self._ends(load, self._now_us)
            self._arrivals[load.key] = (self._now_us, load)
            self.stats.arrived(load.key.layer, copy.num_bytes, copy.demanded, copy.us / 1e6)
