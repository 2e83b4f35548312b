"""The host tier over the disk: experts are read into slots as steps want them, or on a guess."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from copy import copy

from moeserve.cache.expert_cache import ExpertCache
from moeserve.cache.record_copy import Urgency
from moeserve.cache.tiers.disk_store import DiskStore
from moeserve.cache.tiers.host_slots import HostSlots
from moeserve.cache.tiers.source import ExpertSource, StoreError
from moeserve.cache.transfer import Arrival
from moeserve.cache.types import CacheError, ExpertState, Load
from moeserve.chores import Chores
from moeserve.core import ExpertKey, Placement
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.experts.reads import Reads, SlotMemory
from moeserve.experts.stats import cache_stats, link_stats
from moeserve.experts.supply import ExpertSupply, Group, Supplied
from moeserve.stats import CacheStats, LinkStats

logger = logging.getLogger(__name__)


class OtherReaders:
    """Who reads slots of the host tier besides the CPU: here nobody. A faster tier is told of what
    is written, and asked to end its reads where a step lacks slots."""

    def write_begins(self, load: Load) -> None:
        """A record is read from disk into the slot from now on."""

    def write_ends(self, load: Load) -> None:
        """It is complete and may be read."""

    def let_go(self) -> None:
        """Calls off reads that no step waits for and that have not begun."""

    def wait(self) -> bool:
        """Until one slot fewer is read; False where none is."""
        return False


class DiskSupply(ExpertSupply):
    """The packed experts of a layer read their records where this puts them.

    A layer that wants more experts than there are slots gets them wave by wave; while one wave is
    computed the next is read, as far as slots can be had. So two slots are enough for any batch.
    """

    def __init__(
        self,
        cache: ExpertCache,
        store: DiskStore,
        slots: HostSlots,
        transfers: Reads,
        chores: Chores,
        awake: AbstractContextManager[object],
    ) -> None:
        """transfers: from that store into those slots. chores: done while a step waits for one.
        awake: entered while a step waits and there is nothing else to do."""
        self.timeline = transfers.timeline
        self.cache = cache
        self.slots = slots
        self.transfers = transfers
        self.chores = chores
        self._awake = awake
        self.readers = OtherReaders()
        self._store = store
        self._layers: dict[int, PackedExperts] = {}
        # Whose record was last put into a slot, and where the kernels find an expert's record. An
        # expert that was evicted stays known until its slot is written again.
        self._owners: dict[int, ExpertKey] = {}
        self._places: dict[ExpertKey, int] = {}
        self._failed: dict[ExpertKey, StoreError] = {}  # since it was last read

    def read_with(self, make: Callable[[ExpertSource, SlotMemory], Reads]) -> None:
        """Reads by other means from now on, before anything was read. make: gets the records and
        the memory of a slot by its number."""
        assert not self.transfers.num_active, "records are on their way"
        self.transfers.close()
        self.transfers = make(self._store, self.slots.__getitem__)

    def add_layer(self, layer: int, experts: PackedExperts) -> None:
        """Takes over where the layer's records are."""
        for expert in range(experts.spec.num_experts):
            experts.native.clear_record(expert)
        self._layers[layer] = experts

    @contextmanager
    def acquire(self, placement: Placement) -> Iterator[Supplied]:
        self.collect()
        with closing(self._groups(placement)) as groups:
            next(groups)  # up to where the first wave's reads have begun
            yield Supplied(self.cache.slots(placement.layer), groups)

    def begin_prefetch(self, loads: tuple[Load, ...]) -> None:
        """Begins to read what the cache has given slots on a guess."""
        self._begin(loads, Urgency.PREFETCH)

    def collect(self) -> None:
        """Takes what has arrived meanwhile, and returns memory that is no longer to be used."""
        for arrival in self.transfers.finished():
            self._take(arrival)
        if given_up := self.cache.take_given_up():
            self._give_back(given_up)

    def resize(self, num_slots: int) -> None:
        """More or fewer slots, at once as far as they are not in use, the rest when they are free.

        Raises CacheError below two, MemoryError where there is no room for more.
        """
        if num_slots < 2:
            raise CacheError(f"{num_slots} slots; a step needs at least 2")
        self.slots.grow(num_slots)
        change = self.cache.resize(num_slots)
        for slot in change.added:
            self.slots.take_back(slot)
        self._give_back(change.given_up)

    def settle(self) -> None:
        """Waits until memory is no longer in use that a smaller size has no room for: what is being
        read into it arrives first. Only between two steps, when no lease names a slot."""
        self.collect()
        if self.cache.num_owed:
            for load in self.transfers.cancel_prefetches():
                self.cache.abandon(load.key)
            self.readers.let_go()
        while self.cache.num_owed:
            if not self.readers.wait():
                self._take_all(self.transfers.wait())
        self.collect()

    def busy_s(self) -> float:
        """Seconds for which anything was being read so far."""
        return self.transfers.stats.busy_s

    @property
    def trouble(self) -> StoreError | None:
        """Why a record could not be read that has not been read since."""
        return next(iter(self._failed.values()), None)

    def retry_failed(self, most_s: float) -> None:
        """Tries those records again that could not be read, until one cannot or time is up: who
        mends a file should not have to wait until a step wants them."""
        end_s = time.monotonic() + most_s
        while self._failed and time.monotonic() < end_s:
            key = next(iter(self._failed))
            try:
                self._store.verify(key)
            except StoreError as error:
                self._failed[key] = error
                self._store.doubt(key)
                return
            except OSError:  # as before, for all that is known
                self._store.doubt(key)
                return
            del self._failed[key]

    def stats(self) -> tuple[list[CacheStats], list[LinkStats]]:
        return (
            [cache_stats(self.cache, self.slots.slot_bytes)],
            [link_stats(self.cache.tier, self.cache.numbers, self.transfers.snapshot())],
        )

    def check_integrity(self) -> None:
        self.collect()
        self.cache.check_integrity()
        self.transfers.check_integrity()
        for key, slot in self._places.items():
            assert self._owners[slot] == key, f"{key} is read where another was written"
        for layer in self._layers:
            for expert in self.cache.residency(layer).ready:
                key = ExpertKey(layer, expert)
                assert self._places[key] == self.cache.slots(layer).slots[expert], f"{key} moved"

    def close(self) -> None:
        self.transfers.close()
        self._store.close()

    # Waves

    def _groups(self, placement: Placement) -> Generator[Group, None, None]:
        """An empty group first, when the reads of the first wave have begun."""
        now, rest = placement.on_cpu, placement.fetch_first
        self.transfers.promote([ExpertKey(placement.layer, e) for e in rest])
        begun = False
        while now or rest or not begun:
            fetched, rest = self._split(placement.layer, now, rest)
            wave = Placement(placement.layer, fetch_first=fetched, on_cpu=now)
            with self.cache.acquire(wave) as slots:
                self._begin(slots.loads, Urgency.DEMAND)
                if rest:  # a later wave needs them in any case: no guess
                    ahead = [ExpertKey(placement.layer, e) for e in rest]
                    self._begin(self.cache.prefetch(ahead, wave, guess=False), Urgency.DEMAND)
                if not begun:
                    begun = True
                    yield ()
                if now:
                    yield now
                yield from self._as_they_arrive(placement.layer, fetched)
            now = ()

    def _split(self, layer: int, now: Group, rest: Group) -> tuple[Group, Group]:
        """What of `rest` can have a slot beside `now`, and what must wait for a later wave."""
        present = tuple(e for e in rest if self._state(layer, e) is not ExpertState.ABSENT)
        absent = tuple(e for e in rest if e not in present)
        if not absent:
            return present, ()
        kept = Placement(layer, fetch_first=present, on_cpu=now)
        if self.cache.num_obtainable(kept) < len(absent):
            for load in self.transfers.cancel_prefetches():  # of other layers: these are promoted
                self.cache.abandon(load.key)
            self.readers.let_go()
        while not (now or present or self.cache.num_obtainable(kept)) and absent:
            if self.readers.wait():
                continue
            if not self.transfers.num_active:
                raise CacheError(f"layer {layer}: none of {self.cache.num_slots} slots can be had")
            with self.timeline.span("stall", layer=layer):  # for a slot
                self._wait(layer)
        count = self.cache.num_obtainable(kept)
        return present + absent[:count], absent[count:]

    def _as_they_arrive(self, layer: int, wanted: Group) -> Iterator[Group]:
        missing = list(wanted)
        while missing:
            ready = [e for e in missing if self._state(layer, e) is ExpertState.READY]
            for expert in missing:
                if self._state(layer, expert) is ExpertState.ABSENT:
                    # A copy: what is kept would hold the frames that it was raised through.
                    raise copy(self._failed[ExpertKey(layer, expert)])
            if ready:
                missing = [e for e in missing if e not in ready]
                yield tuple(ready)
                self.collect()
            else:
                with self.timeline.span("stall", layer=layer, experts=missing):
                    self.chores.do_while(self.transfers.none_finished)
                    self._wait(layer)

    def _wait(self, layer: int) -> None:
        """For records, until at least one has arrived."""
        with self._awake:
            arrivals = self.transfers.wait(layer)
        self._take_all(arrivals)

    def _state(self, layer: int, expert: int) -> ExpertState:
        return self.cache.state(ExpertKey(layer, expert))

    # Bytes

    def _begin(self, loads: Sequence[Load], urgency: Urgency) -> None:
        for load in loads:
            self._disown(load.slot)
            self.readers.write_begins(load)
        if loads:
            self.transfers.start(loads, urgency)

    def _take_all(self, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            self._take(arrival)

    def _take(self, arrival: Arrival) -> None:
        """An error is raised when a step needs the expert: of a guess it may be that none does."""
        key, slot = arrival.load.key, arrival.load.slot
        if arrival.error is not None:
            logger.warning("layer %d, expert %d: %s", *key, arrival.error)
            self._failed[key] = arrival.error
            self._store.doubt(key)
            self.cache.abandon(key)
            return
        self._failed.pop(key, None)
        experts = self._layers[key.layer]
        experts.native.set_record(key.expert, self.slots[slot][: experts.record_bytes])
        self._owners[slot], self._places[key] = key, slot
        self.readers.write_ends(arrival.load)
        self.cache.complete(key)

    def _disown(self, slot: int) -> None:
        """The kernels refuse from now on what stood in the slot."""
        key = self._owners.pop(slot, None)
        if key is not None and self._places[key] == slot:  # else it came back to another slot
            del self._places[key]
            self._layers[key.layer].native.clear_record(key.expert)

    def _give_back(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._disown(slot)
            self.slots.give_back(slot)
