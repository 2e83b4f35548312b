"""Which experts stand in which slot of one tier: bookkeeping only, no torch, no bytes.

A slot's life: free, then LOADING (a mover writes it), then READY (it may be read), then free again.
Who reads holds a lease; while a lease names an expert, its slot is not given away.

Slots are shared by all layers. Inside, experts are numbers in flat arrays, so that a step costs a
few array operations over all experts and no loop; see `ExpertNumbers`.

All methods are called on one thread; a mover's thread hands its completions over to that thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.counters import CacheCounters
from moeserve.cache.floors import victims_above_floor
from moeserve.cache.lease import Lease
from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.cache.policies.base import Policy
from moeserve.cache.slot_table import SlotTable
from moeserve.cache.types import (
    CacheError,
    ExpertState,
    LayerSlots,
    Load,
    Residency,
    SlotChange,
    Tier,
)
from moeserve.core import ExpertKey, LayerUse, Placement

__all__ = [
    "CacheError",
    "ExpertCache",
    "ExpertState",
    "LayerSlots",
    "Load",
    "Residency",
    "SlotChange",
    "Tier",
    "resident_cache",
]


class ExpertCache:
    """The slots of one tier, shared by all MoE layers."""

    def __init__(
        self,
        tier: Tier,
        num_experts: Mapping[int, int],
        num_slots: int,
        policy: Policy,
        floor: int = 0,
    ) -> None:
        """num_experts: experts per MoE layer, by the layer's index in the model.

        floor: slots that a layer keeps, once it has them, against prefetches and other layers. Its
        own fetches may replace its own experts, and a fetch that finds no other slot goes below it.
        """
        self.tier = tier
        self.policy = policy
        self.numbers = ExpertNumbers(num_experts)
        self.counters = CacheCounters.of(self.numbers)
        self.floor = floor
        self._table = SlotTable(tier, self.numbers, num_slots)
        self._unproven = np.zeros(self.numbers.total, np.bool_)  # prefetched, not wanted so far
        self._num_unproven = 0
        self._leases: list[Lease] = []

    # Questions

    @property
    def num_slots(self) -> int:
        """Capacity. While a smaller one is being reached, `num_owed` more slots are in use."""
        return self._table.pool.capacity

    @property
    def num_free(self) -> int:
        return self._table.pool.num_free

    @property
    def num_owed(self) -> int:
        return self._table.pool.num_owed

    def state(self, key: ExpertKey) -> ExpertState:
        return self._table.state(key)

    def residency(self, layer: int) -> Residency:
        """Which experts of the layer are READY."""
        return self._table.residency(layer)

    def slots(self, layer: int) -> LayerSlots:
        """Where the layer's experts stand, READY or LOADING."""
        return self._table.slots(layer)

    @property
    def holds_everything(self) -> bool:
        """Whether every expert has a slot: nothing is left to be fetched."""
        return self._table.pool.capacity - self._table.pool.num_free >= self.numbers.total

    def is_settled(self, layer: int) -> bool:
        """Whether every expert has a slot and this layer's are READY: its steps find everything
        where it is, and nothing that they say changes what is where."""
        return self.holds_everything and self.residency(layer).complete

    def num_obtainable(self, protect: Placement) -> int:
        """Slots that a fetch can have without taking what a lease or `protect` names."""
        return self.num_free + len(self._evictable(protect))

    def absent(self) -> Numbers:
        """Experts that have no slot, by their numbers."""
        return self._table.absent()

    def which_absent(self, numbers: Numbers) -> NDArray[np.bool_]:
        """Of experts by their numbers, [n]: those that have no slot, [n]."""
        return self._table.which_absent(numbers)

    def which_ready(self, numbers: Numbers) -> NDArray[np.bool_]:
        """Of experts by their numbers, [n]: those that are READY, [n]."""
        return self._table.which_ready(numbers)

    def next_victims(self, count: int, protect: Placement) -> list[int]:
        """Whom so many more experts would take the slots of, free slots aside, by their numbers."""
        return self._victims(count, protect=protect)

    # Use

    def observe(self, use: LayerUse) -> None:
        """What a step asks of a layer: counts hits and misses and tells the policy. Before
        `acquire`; where everything is resident, it may be left out."""
        rank = self.numbers.rank_of[use.layer]
        if self._num_unproven:
            self._prove(use, rank)
        if self.is_settled(use.layer):  # there is nothing to choose, nor to learn for it
            self.counters.hits[rank] += np.count_nonzero(use.rows)
            return
        absent, late, ready = self._table.counted(use.layer, use.rows > 0)
        self.counters.misses[rank] += absent
        self.counters.late[rank] += late
        self.counters.hits[rank] += ready
        if not self.holds_everything:
            self.policy.observed(use)

    def _prove(self, use: LayerUse, rank: int) -> None:
        """Guesses that came true: what was prefetched is wanted."""
        unproven = self._unproven[self.numbers.span_of[use.layer]]
        useful = unproven & (use.rows > 0)
        count = int(np.count_nonzero(useful))
        if count:
            self.counters.prefetches_useful[rank] += count
            unproven[useful] = False
            self._num_unproven -= count

    def expect(self, layer: int, probabilities: NDArray[np.float32]) -> None:
        """Tells the policy what a predictor says of the layer's next use: [E], P(any row wants
        the expert)."""
        self.policy.expected(layer, probabilities)

    def acquire(self, placement: Placement) -> Lease:
        """`with cache.acquire(placement) as slots:` pins the placement's experts of this tier.

        Those that are absent and in `fetch_first` get slots, by eviction if need be; their loads
        are in the LayerSlots. Entering raises CacheError, and changes nothing, where an expert that
        is to be read now is not READY or the unpinned slots do not suffice.
        """
        now = placement.on_device if self.tier is Tier.DEVICE else placement.on_cpu
        return Lease(self, placement, now + placement.fetch_first if placement.fetch_first else now)

    def begin(self, lease: Lease) -> LayerSlots:
        """Enters a lease; see `acquire`."""
        placement, layer = lease.placement, lease.placement.layer
        now = placement.on_device if self.tier is Tier.DEVICE else placement.on_cpu
        residency = self.residency(layer)
        if not residency.complete and not residency.ready.issuperset(now):
            missing = sorted(set(now) - residency.ready)
            raise CacheError(f"layer {layer}: experts {missing} are not ready in {self.tier.value}")
        self._leases.append(lease)
        loads = self._fetch(lease) if placement.fetch_first else ()
        others = placement.on_cpu if self.tier is Tier.DEVICE else placement.on_device
        self.policy.used(layer, lease.experts + others if others else lease.experts)
        slots = self.slots(layer)
        return LayerSlots(layer, slots.slots, slots.version, loads) if loads else slots

    def pin(self, key: ExpertKey) -> Lease:
        """Keeps a READY expert in its slot until `end`, although no step reads it but a copy to a
        faster tier: no use, of which the policy would be told. CacheError where it is not READY."""
        if self.state(key) is not ExpertState.READY:
            raise CacheError(f"{key} cannot be copied from {self.tier.value}: it is not ready")
        lease = Lease(self, Placement(key.layer, on_cpu=(key.expert,)), (key.expert,))
        self._leases.append(lease)
        return lease

    def end(self, lease: Lease) -> None:
        """Leaves a lease; it goes on while its readers do."""
        if lease.finished:
            self._leases.remove(lease)
            self._settle()
        else:
            lease.outlived = True

    def _fetch(self, lease: Lease) -> tuple[Load, ...]:
        layer = lease.placement.layer
        wanted = self.numbers.of(layer, dict.fromkeys(lease.placement.fetch_first))
        absent: Numbers = wanted[self._table.which_absent(wanted)]
        victims = self._victims(len(absent), layer=layer)
        available = self.num_free + len(victims)
        if len(absent) > available:
            self._leases.remove(lease)
            raise CacheError(
                f"layer {layer}: {len(absent)} experts must be fetched, {available} of"
                f" {self.num_slots} slots can be had",
                hint="give the tier more memory or the step fewer tokens",
            )
        for number in victims:
            self._evict(number)
        return tuple(self._table.begin_load(int(n)) for n in absent)

    def prefetch(
        self, keys: Iterable[ExpertKey], protect: Placement | None = None, guess: bool = True
    ) -> tuple[Load, ...]:
        """Begins to load the keys, most wanted first, as far as slots can be had for them.

        guess: whether they may turn out not to be wanted. What the running step will need in any
        case is worth any slot, and is not counted among the prefetches.

        Takes nothing that a lease or `protect` names (DESIGN, invariant 2), nothing that is still
        on its way and nothing that the policy holds for worth more. Present experts are skipped.
        The caller moves the bytes.
        """
        number = self.numbers.number
        wanted = np.fromiter((number(key) for key in dict.fromkeys(keys)), np.int64)
        absent: Numbers = wanted[self._table.which_absent(wanted)]
        incoming = absent if guess else None
        for victim in self._victims(len(absent), protect=protect, incoming=incoming):
            self._evict(victim)
        absent = absent[: self.num_free]
        if guess:
            self._unproven[absent] = True
            self._num_unproven += len(absent)
            np.add.at(self.counters.prefetches_begun, self.numbers.rank[absent], 1)
        return tuple(self._table.begin_load(int(n)) for n in absent)

    def complete(self, key: ExpertKey) -> None:
        """The expert's bytes have arrived: LOADING becomes READY."""
        number = self._table.loading(key)
        self._table.arrived(number)
        self.policy.loaded(number)
        self._settle()

    def abandon(self, key: ExpertKey) -> None:
        """The load failed or was called off: LOADING becomes ABSENT, the slot is free again."""
        number = self._table.loading(key)
        for lease in self._leases:
            if lease.pins(key.layer, key.expert):
                lease.forget(key.expert)
        self._drop(number)

    def evict(self, key: ExpertKey) -> None:
        """Takes the slot of a READY expert that no lease names; CacheError otherwise."""
        self._reap()
        pinned = any(lease.pins(key.layer, key.expert) for lease in self._leases)
        if pinned or self.state(key) is not ExpertState.READY:
            raise CacheError(f"{key} cannot be evicted: {self.state(key).value}, or in use")
        self._evict(self.numbers.number(key))

    def resize(self, num_slots: int) -> SlotChange:
        """Changes the capacity: more slots at once, fewer by evicting what is not in use.

        Slots in use or loading go when they are released: `take_given_up` hands them out. Raises
        CacheError below one slot.
        """
        if num_slots < 1:
            raise CacheError(f"num_slots: {num_slots} is too few; at least 1")
        added = self._table.pool.resize(num_slots)
        return SlotChange(added, self.take_given_up())

    def take_given_up(self) -> tuple[int, ...]:
        """Slots given up since it was last asked, after `resize` made the cache smaller."""
        self._settle()
        return self._table.pool.take_given_up()

    # Inside

    def _settle(self) -> None:
        """Gives up slots that are owed since the cache was made smaller, as far as they are free
        to go."""
        if not self._table.pool.num_owed:
            return
        candidates = self._evictable(None)
        count = self._table.pool.num_owed
        victims = self.policy.victims(candidates, count)
        # a policy that gives nothing up, as `resident`, has no say when memory is taken away
        others = np.setdiff1d(candidates, victims).tolist()
        for number in (victims + others)[:count]:
            self._evict(number)

    def _evictable(self, protect: Placement | None) -> Numbers:
        """READY and named by no lease and not by `protect`."""
        self._reap()
        open_ = self._table.ready()
        for lease in self._leases:
            open_[self.numbers.of(lease.placement.layer, lease.experts)] = False
        if protect is not None:
            named = protect.on_device + protect.fetch_first + protect.on_cpu
            open_[self.numbers.of(protect.layer, named)] = False
        candidates: Numbers = np.flatnonzero(open_)
        return candidates

    def _victims(
        self,
        count: int,
        layer: int | None = None,
        protect: Placement | None = None,
        incoming: Numbers | None = None,
    ) -> list[int]:
        """What the policy gives up to make `count` slots free; fewer where it has no more.

        layer: whose demand it is; it may take its own below the floor, and others' if need be.
        """
        count -= self.num_free
        if count <= 0:
            return []
        if incoming is not None:
            incoming = incoming[self.num_free :]
        candidates = self._evictable(protect)
        if not self.floor:
            return self.policy.victims(candidates, count, incoming)
        spare = self._table.held - self.floor
        if layer is not None:
            spare[self.numbers.rank_of[layer]] = count
        rank = self.numbers.rank
        chosen = victims_above_floor(self.policy, candidates, count, rank, spare, incoming)
        if layer is not None and len(chosen) < count:
            rest: Numbers = np.setdiff1d(candidates, chosen)
            chosen += self.policy.victims(rest, count - len(chosen))
        return chosen

    def _reap(self) -> None:
        """Ends the leases whose readers are done."""
        if any(lease.outlived and lease.finished for lease in self._leases):
            self._leases = [x for x in self._leases if not (x.outlived and x.finished)]

    def _evict(self, number: int) -> None:
        self.counters.evictions[self.numbers.rank[number]] += 1
        self._drop(number)
        self.policy.evicted(number)

    def _drop(self, number: int) -> None:
        self._table.drop(number)
        if self._unproven[number]:
            self._unproven[number] = False
            self._num_unproven -= 1
            self.counters.prefetches_wasted[self.numbers.rank[number]] += 1

    def check_integrity(self) -> None:
        """Recomputes everything derived; AssertionError where the books do not agree."""
        read = (
            ExpertKey(lease.placement.layer, expert)
            for lease in self._leases
            for expert in lease.experts
        )
        self._table.check_integrity(read, self._unproven)
        assert np.count_nonzero(self._unproven) == self._num_unproven, "unproven ones miscounted"


def resident_cache(tier: Tier, num_experts: Mapping[int, int], policy: Policy) -> ExpertCache:
    """A cache with a slot for every expert, all READY: the loader has put them there."""
    cache = ExpertCache(tier, num_experts, sum(num_experts.values()), policy)
    keys = [ExpertKey(layer, e) for layer, size in num_experts.items() for e in range(size)]
    for load in cache.prefetch(keys, guess=False):
        cache.complete(load.key)
    return cache
