"""Reads from disk on the clock of an emulated device, where the CPU's time is emulated, too.

There a read takes the time that a disk of the profile would have taken. The record is really read
and checked, at once; who waits for it learns of it when that time has come, so that a run gives the
same times again whatever the disk of this machine does meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from moeserve.cache.record_copy import Urgency
from moeserve.cache.tiers.source import ExpertSource, StoreError
from moeserve.cache.transfer import Arrival
from moeserve.cache.transfer_stats import TransferStats
from moeserve.cache.types import Load
from moeserve.core import ExpertKey
from moeserve.experts.device.clock import EmulatedClock
from moeserve.experts.device.emulated_link import EmulatedLink
from moeserve.experts.reads import SlotMemory
from moeserve.timeline import Timeline


class ModelledReads:
    """What a DiskSupply asks of `cache.transfer.Transfers`, without threads: one read at a time,
    demands before prefetches. An error that the system reports is not waited out."""

    def __init__(
        self,
        source: ExpertSource,
        slot: SlotMemory,
        clock: EmulatedClock,
        read_us: Callable[[ExpertKey], float],
        timeline: Timeline,
    ) -> None:
        """read_us: of a record, alone."""
        self.timeline = timeline
        self._source = source
        self._slot = slot
        self._clock = clock
        self._read_us = read_us
        self._disk = EmulatedLink(lambda load, us: None, self._read, timeline, ("read", "disk"))
        self._errors: dict[ExpertKey, StoreError] = {}

    @property
    def stats(self) -> TransferStats:
        return self._disk.stats

    @property
    def num_active(self) -> int:
        return self._disk.num_active

    def start(self, loads: Iterable[Load], urgency: Urgency) -> None:
        now_us = self._clock.now_us()
        self._disk.advance(now_us)
        for load in loads:
            num_bytes, us = self._source.num_bytes(load.key), self._read_us(load.key)
            if urgency is Urgency.DEMAND:
                self._disk.demand(load, num_bytes, us, now_us)
            else:
                self._disk.prefetch(load, num_bytes, us)

    def promote(self, keys: Iterable[ExpertKey]) -> None:
        for key in keys:
            self._disk.promote(key, self._clock.now_us())

    def cancel_prefetches(self) -> list[Load]:
        self._disk.advance(self._clock.now_us())
        return self._disk.cancel_prefetches()

    def finished(self) -> list[Arrival]:
        return [
            Arrival(load, self._errors.pop(load.key, None))
            for load in self._disk.finished(self._clock.now_us())
        ]

    def none_finished(self) -> bool:
        """Time stands still while nobody waits."""
        return True

    def wait(self, layer: int | None = None) -> list[Arrival]:
        """Lets the time come at which the next record is there. layer: whose step waits."""
        now_us = self._clock.now_us()
        end_us = self._disk.next_end_us(now_us)
        assert end_us is not None, "nothing is on its way"
        self.stats.waited(layer, max(0.0, end_us - now_us) / 1e6)
        self._clock.wait_until(end_us)
        return self.finished()

    def snapshot(self) -> TransferStats:
        return self.stats.copy()

    def check_integrity(self) -> None:
        assert self._errors.keys() <= self._disk.keys(), "an error of a read that nobody made"

    def close(self) -> None:
        """There are no threads."""

    def _read(self, load: Load, us: float) -> None:
        record = self._slot(load.slot).data[: self._source.num_bytes(load.key)]
        try:
            with self._clock.left_out():
                self._source.read(load.key, 0, record)
                self._source.check(load.key, record)
        except StoreError as error:
            self._failed(load.key, error)
        except OSError as error:
            self._failed(load.key, StoreError(f"records of experts cannot be read: {error}"))

    def _failed(self, key: ExpertKey, error: StoreError) -> None:
        self.stats.num_failed += 1
        self._errors[key] = error
