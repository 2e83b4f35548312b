"""The device tier over the host: copies of the experts that are worth a slot there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moeserve.cache.expert_cache import ExpertCache
from moeserve.cache.types import CacheError, ExpertState, Load, Residency
from moeserve.core import ExpertKey, LayerUse, Placement
from moeserve.experts.device.emulated import EmulatedDevice
from moeserve.experts.schedule.intra_layer import IntraLayerScheduler
from moeserve.experts.stats import cache_stats, link_stats
from moeserve.experts.supply import ExpertSupply, Supplied
from moeserve.stats import CacheStats, LinkStats


class DeviceSupply(ExpertSupply):
    """Every expert is in host memory, too, so none needs a slot: one is enough for any batch."""

    def __init__(self, cache: ExpertCache, device: EmulatedDevice) -> None:
        self.cache = cache
        self.device = device

    @contextmanager
    def acquire(self, placement: Placement) -> Iterator[Supplied]:
        """What is to be fetched first is demanded from the link before the context is entered."""
        device, layer = self.device, placement.layer
        self.collect()
        lease = self.cache.acquire(placement)
        lease.until(device.is_idle)
        with lease as slots:
            now_us = device.clock.now_us()
            for expert in placement.fetch_first:
                device.link.promote(ExpertKey(layer, expert), now_us)
            device.demand(slots.loads)
            yield Supplied(slots, iter((placement.on_cpu,)))
        device.clock.end_layer()
        self.collect()

    def prefetch(self, loads: Sequence[Load]) -> None:
        """Begins to copy into slots that the cache gave for it, when the link has nothing else."""
        self.device.prefetch(loads)

    def collect(self) -> None:
        """Takes what has arrived meanwhile, and returns memory that is no longer to be used."""
        for load in self.device.finished():
            self.cache.complete(load.key)
        for slot in self.cache.take_given_up():
            self.device.slots.give_back(slot)

    def resize(self, num_slots: int) -> None:
        """More or fewer slots, at once as far as they are not in use, the rest when they are free.

        Raises CacheError below one, MemoryError where there is no room for more.
        """
        if num_slots < 1:
            raise CacheError(f"{num_slots} slots on the device; at least 1")
        self.device.slots.grow(num_slots)
        change = self.cache.resize(num_slots)
        self.device.slots.grow(1 + max(change.added, default=-1))
        for slot in change.given_up:
            self.device.slots.give_back(slot)

    def stats(self) -> tuple[list[CacheStats], list[LinkStats]]:
        """Times of the link are those of the emulated one."""
        return (
            [cache_stats(self.cache, self.device.slots.slot_bytes)],
            [link_stats(self.cache.tier, self.cache.numbers, self.device.link.stats)],
        )

    def check_integrity(self) -> None:
        self.collect()
        self.cache.check_integrity()


class FittingPlacement(IntraLayerScheduler):
    """Another scheduler's placement, as far as slots can be had: what has none runs on the CPU."""

    def __init__(self, intra: IntraLayerScheduler, cache: ExpertCache) -> None:
        self._intra = intra
        self._cache = cache

    def place(self, use: LayerUse, residency: Residency) -> Placement:
        placement = self._intra.place(use, residency)
        fetched = placement.fetch_first
        if not fetched:
            return placement
        absent = [e for e in fetched if self._state(use.layer, e) is ExpertState.ABSENT]
        num_more = self._cache.num_obtainable(placement)
        if len(absent) <= num_more:
            return placement
        left = set(absent[num_more:])
        return Placement(
            use.layer,
            on_device=placement.on_device,
            fetch_first=tuple(e for e in fetched if e not in left),
            on_cpu=placement.on_cpu + tuple(absent[num_more:]),
        )

    def _state(self, layer: int, expert: int) -> ExpertState:
        return self._cache.state(ExpertKey(layer, expert))
