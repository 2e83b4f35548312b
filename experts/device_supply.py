"""The device tier over the host: copies of the experts that are worth a slot there."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np

from moeserve.cache.expert_cache import ExpertCache
from moeserve.cache.types import CacheError, ExpertState, Load, Residency
from moeserve.core import ExpertKey, LayerUse, Placement
from moeserve.experts.device.device import Device
from moeserve.experts.schedule.intra_layer import IntraLayerScheduler
from moeserve.experts.stats import cache_stats, link_stats
from moeserve.experts.supply import ExpertSupply, Group, Supplied
from moeserve.stats import CacheStats, LinkStats


class DeviceSupply(ExpertSupply):
    """What the device does not serve, the host does (`HostSide`): as the source of a copy, or for
    the CPU. So no expert needs a slot here: one is enough for any batch.

    An expert that comes from disk is copied, or computed by the CPU, when it has arrived in the
    host tier. What loses its slot here just goes.
    """

    def __init__(self, cache: ExpertCache, device: Device) -> None:
        self.cache = cache
        self.device = device
        self.host = device.source
        self.host.read_by(self)

    def observe(self, use: LayerUse, placement: Placement) -> None:
        """The host is asked for what the device does not serve, and for nothing else: its policy
        lets go of what stands on the device, so the two hold more different experts together."""
        self.cache.observe(use)
        slots = self.cache.slots(use.layer).slots
        asked = [e for e in placement.fetch_first if slots[e] < 0]
        asked += placement.on_cpu
        of_host = np.zeros(len(use.rows), np.bool_)
        of_host[asked] = True
        self.host.observe(LayerUse(use.layer, use.rows * of_host, use.weights * of_host))

    @contextmanager
    def acquire(self, placement: Placement) -> Iterator[Supplied]:
        """Of what is to be fetched first, everything that is in host memory is demanded from the
        link, and the rest from the disk, before the context is entered."""
        device, layer = self.device, placement.layer
        self.collect()
        lease = self.cache.acquire(placement)
        lease.until(device.is_idle)
        with lease as slots:
            device.promote([ExpertKey(layer, expert) for expert in placement.fetch_first])
            with closing(self._groups(placement, slots.loads)) as groups:
                next(groups)
                yield Supplied(slots, groups)
        device.end_layer()
        self.collect()

    def prefetch(self, loads: Sequence[Load]) -> None:
        """Begins to copy into slots that the cache gave for it, when the link has nothing else.

        The experts must be ready in the host tier.
        """
        for load in loads:
            self.host.pin(load.key)
        self.device.prefetch(loads)

    def collect(self) -> None:
        """Takes what has arrived meanwhile, and returns memory that is no longer to be used."""
        self.host.collect()
        self._collect_copies()
        for slot in self.cache.take_given_up():
            self.device.slots.give_back(slot)

    def let_go(self) -> None:
        """Calls off prefetches that have not begun, and lets go of what those are done with that
        are complete."""
        self._collect_copies()
        for load in self.device.cancel_prefetches():
            self.cache.abandon(load.key)
            self.host.unpin(load.key)

    def wait_for_copy(self) -> bool:
        """Until one more copy is complete; False where none is under way."""
        found = self.device.wait_for_copy()
        self._collect_copies()
        return found

    def resize(self, num_slots: int) -> None:
        """More or fewer slots, at once as far as they are not in use, the rest when they are free.

        Raises CacheError below one, MemoryError where there is no room for more.
        """
        if num_slots < 1:
            raise CacheError(f"{num_slots} slots on the device; at least 1")
        self.device.slots.grow(num_slots)
        change = self.cache.resize(num_slots)
        for slot in change.added:
            self.device.slots.take_back(slot)
        for slot in change.given_up:
            self.device.slots.give_back(slot)

    def stats(self) -> tuple[list[CacheStats], list[LinkStats]]:
        """Times of the link are by the device's clock."""
        caches, links = self.host.stats()
        return (
            [cache_stats(self.cache, self.device.slots.slot_bytes), *caches],
            [link_stats(self.cache.tier, self.cache.numbers, self.device.link_stats()), *links],
        )

    def check_integrity(self) -> None:
        self.collect()
        self.cache.check_integrity()
        self.host.check_integrity(self.device.copying())

    def close(self) -> None:
        self.device.close()
        self.host.close()

    def _groups(self, placement: Placement, loads: Sequence[Load]) -> Generator[Group, None, None]:
        """An empty group first, when every copy and read that can begin has begun."""
        waiting = {load.key.expert: load for load in loads}
        coming = tuple(e for e in placement.fetch_first if e not in waiting)
        try:
            with self.host.acquire(placement.layer, (*waiting, *placement.on_cpu)) as arrivals:
                there = next(arrivals)
                self._copy(there, waiting)
                yield ()
                yield placement.on_device + coming + there
                for group in arrivals:
                    self._copy(group, waiting)
                    yield group
        finally:  # where one could not be read, the others' slots are not to wait for ever
            for load in waiting.values():
                self.cache.abandon(load.key)

    def _copy(self, experts: Group, waiting: dict[int, Load]) -> None:
        """Demands copies of those experts, readable now, that have a slot waiting for them."""
        loads = [waiting.pop(e) for e in experts if e in waiting]
        for load in loads:
            self.host.pin(load.key)
        self.device.demand(loads)

    def _collect_copies(self) -> None:
        for load in self.device.finished():
            self.cache.complete(load.key)
            self.host.unpin(load.key)


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
