"""The middle of three tiers: host slots that are filled from disk and copied to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.expert_cache import ExpertState
from moeserve.cache.lease import Lease
from moeserve.cache.numbering import Numbers
from moeserve.cache.types import Load
from moeserve.core import ExpertKey, LayerUse, Placement
from moeserve.experts.device.slot_guard import SlotGuard
from moeserve.experts.disk_supply import DiskSupply, OtherReaders
from moeserve.experts.host_side import Bytes, Copier, HostSide
from moeserve.experts.supply import Group
from moeserve.stats import CacheStats, LinkStats


class HostOverDisk(HostSide):
    """The host tier over the disk, below a device.

    Copies pin their source. Where a step lacks host slots for that, copies on a guess are called
    off or their end is waited for, so two host slots are still enough for any batch.
    """

    def __init__(self, disk: DiskSupply, now_us: Callable[[], float]) -> None:
        """now_us: the device's clock."""
        self.disk = disk
        self._now_us = now_us
        self._pins: dict[ExpertKey, Lease] = {}
        self.guard = SlotGuard()

    def read_by(self, copier: Copier) -> None:
        self.disk.readers = _Readers(copier, self.guard, self._now_us)

    def is_ready(self, key: ExpertKey) -> bool:
        return self.disk.cache.state(key) is ExpertState.READY

    def which_ready(self, numbers: Numbers) -> NDArray[np.bool_]:
        return self.disk.cache.which_ready(numbers)

    def observe(self, use: LayerUse) -> None:
        self.disk.cache.observe(use)

    @contextmanager
    def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[Iterator[Group]]:
        ready = tuple(e for e in experts if self.is_ready(ExpertKey(layer, e)))
        absent = tuple(e for e in experts if e not in ready)
        with self.disk.acquire(Placement(layer, fetch_first=absent, on_cpu=ready)) as supplied:
            nothing_yet: tuple[Group, ...] = () if ready else ((),)
            yield chain(nothing_yet, supplied.groups)

    def record(self, key: ExpertKey) -> Bytes:
        return self.disk.slots[self._slot(key)]

    def pin(self, key: ExpertKey) -> None:
        self._pins[key] = self.disk.cache.pin(key)

    def unpin(self, key: ExpertKey) -> None:
        self.disk.cache.end(self._pins.pop(key))

    def read_begins(self, key: ExpertKey, us: float) -> None:
        self.guard.read_begins(self._slot(key), key, us)

    def read_ends(self, key: ExpertKey, us: float) -> None:
        self.guard.read_ends(self._slot(key), key, us)

    def collect(self) -> None:
        self.disk.collect()

    def stats(self) -> tuple[list[CacheStats], list[LinkStats]]:
        return self.disk.stats()

    def check_integrity(self, copied: set[ExpertKey]) -> None:
        assert self._pins.keys() == copied, "copies and what is pinned for them do not agree"
        self.disk.check_integrity()

    def close(self) -> None:
        self.disk.close()

    def _slot(self, key: ExpertKey) -> int:
        return self.disk.cache.slots(key.layer).slots[key.expert]


class _Readers(OtherReaders):
    """A device's copies, as the supply from disk is to know of them."""

    def __init__(self, copier: Copier, guard: SlotGuard, now_us: Callable[[], float]) -> None:
        self._copier = copier
        self._guard = guard
        self._now_us = now_us

    def write_begins(self, load: Load) -> None:
        self._guard.write_begins(load.slot, load.key, self._now_us())

    def write_ends(self, load: Load) -> None:
        self._guard.write_ends(load.slot, load.key, self._now_us())

    def let_go(self) -> None:
        self._copier.let_go()

    def wait(self) -> bool:
        return self._copier.wait_for_copy()
