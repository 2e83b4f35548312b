"""Which experts stand in which slot of one tier: bookkeeping only, no torch, no bytes.

A slot's life: free, then LOADING (a mover writes it), then READY (it may be read), then free again.
Who reads holds a lease; while a lease names an expert, its slot is not given away. A lease names
its experts as a whole, so that taking and ending one costs the same for one expert or a hundred.

All methods are called on one thread; a mover's thread hands its completions over to that thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from moeserve.cache.policies.base import Policy
from moeserve.core import ErrorCode, ExpertKey, MoeserveError, Placement


class Tier(str, Enum):
    """Where expert weights live, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class ExpertState(Enum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"


class CacheError(MoeserveError):
    """The slots cannot hold what was asked for, or an expert was used against its state."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, code=ErrorCode.INTERNAL, hint=hint)


@dataclass(frozen=True)
class Load:
    """An order to a mover: write this expert into this slot, then `complete` or `abandon` it."""

    key: ExpertKey
    slot: int


@dataclass(frozen=True)
class Residency:
    """What of one layer is READY in the cache's tier."""

    layer: int
    tier: Tier
    num_experts: int
    ready: frozenset[int]

    @property
    def complete(self) -> bool:
        return len(self.ready) == self.num_experts


@dataclass(frozen=True)
class LayerSlots:
    """Where the experts of one layer stand: slots[e], -1 for those without a slot.

    version: grows with every change of `slots`, so that a copy on the device can be kept.
    loads: what must be written before the placement's `fetch_first` can be read.
    """

    layer: int
    slots: tuple[int, ...]
    version: int
    loads: tuple[Load, ...] = ()


@dataclass(frozen=True)
class _Slot:
    index: int
    state: ExpertState


@dataclass(eq=False)
class _Lease:
    """Experts that a running step reads. abandoned: those whose load failed under it."""

    placement: Placement
    experts: tuple[int, ...]
    abandoned: set[int] = field(default_factory=set)

    def pins(self, key: ExpertKey) -> bool:
        if key.layer != self.placement.layer or key.expert in self.abandoned:
            return False
        return key.expert in self.experts


class ExpertCache:
    """The slots of one tier, shared by all MoE layers."""

    def __init__(
        self, tier: Tier, num_experts: Mapping[int, int], num_slots: int, policy: Policy
    ) -> None:
        """num_experts: experts per MoE layer, by the layer's index in the model."""
        self.tier = tier
        self.num_slots = num_slots
        self.policy = policy
        self._num_experts = dict(num_experts)
        self._slots: dict[ExpertKey, _Slot] = {}
        self._free = list(range(num_slots - 1, -1, -1))  # popped from the end: lowest first
        self._leases: list[_Lease] = []
        self._versions = dict.fromkeys(self._num_experts, 0)
        # Derived from _slots when first asked for, dropped by _changed: in the steady state of a
        # resident layer both are found, not computed.
        self._residency: dict[int, Residency] = {}
        self._layer_slots: dict[int, LayerSlots] = {}

    # Questions

    def state(self, key: ExpertKey) -> ExpertState:
        slot = self._slots.get(key)
        return ExpertState.ABSENT if slot is None else slot.state

    def residency(self, layer: int) -> Residency:
        """Which experts of the layer are READY."""
        found = self._residency.get(layer)
        if found is None:
            size = self._num_experts[layer]
            keys = (ExpertKey(layer, e) for e in range(size))
            ready = frozenset(k.expert for k in keys if self.state(k) is ExpertState.READY)
            found = Residency(layer, self.tier, size, ready)
            self._residency[layer] = found
        return found

    def slots(self, layer: int) -> LayerSlots:
        """Where the layer's experts stand, READY or LOADING."""
        found = self._layer_slots.get(layer)
        if found is None:
            held = (self._slots.get(ExpertKey(layer, e)) for e in range(self._num_experts[layer]))
            slots = tuple(-1 if slot is None else slot.index for slot in held)
            found = LayerSlots(layer, slots, self._versions[layer])
            self._layer_slots[layer] = found
        return found

    @property
    def num_free(self) -> int:
        return len(self._free)

    # Use

    @contextmanager
    def acquire(self, placement: Placement) -> Iterator[LayerSlots]:
        """Pins the placement's experts of this tier while the context lasts.

        Those that are absent and in `fetch_first` get slots, by eviction if need be; their loads
        are in the LayerSlots. Raises CacheError, and changes nothing, where an expert that is to be
        read now is not READY or the unpinned slots do not suffice.
        """
        lease, loads = self._take(placement)
        try:
            slots = self.slots(placement.layer)
            yield LayerSlots(slots.layer, slots.slots, slots.version, loads) if loads else slots
        finally:
            self._leases.remove(lease)

    def _take(self, placement: Placement) -> tuple[_Lease, tuple[Load, ...]]:
        layer = placement.layer
        now = placement.on_device if self.tier is Tier.DEVICE else placement.on_cpu
        residency = self.residency(layer)
        if not residency.complete and not residency.ready.issuperset(now):
            missing = sorted(set(now) - residency.ready)
            raise CacheError(f"layer {layer}: experts {missing} are not ready in {self.tier.value}")
        lease = _Lease(placement, now + placement.fetch_first)
        self._leases.append(lease)
        wanted = [ExpertKey(layer, e) for e in placement.fetch_first]
        absent = [key for key in wanted if key not in self._slots]
        victims = self._victims(len(absent), protect=None)
        available = len(self._free) + len(victims)
        if len(absent) > available:
            self._leases.remove(lease)
            raise CacheError(
                f"layer {layer}: {len(absent)} experts must be fetched, {available} of"
                f" {self.num_slots} slots can be had",
                hint="give the tier more memory or the step fewer tokens",
            )
        for key in victims:
            self.evict(key)
        self.policy.used(layer, lease.experts)
        return lease, tuple(self._begin(key) for key in absent)

    def prefetch(
        self, keys: Iterable[ExpertKey], protect: Placement | None = None
    ) -> tuple[Load, ...]:
        """Begins to load the keys, most wanted first, as far as slots can be had for them.

        Takes nothing that a lease or `protect` names (DESIGN, invariant 2) and nothing that is
        still on its way. Present experts are skipped. The caller moves the bytes.
        """
        absent = [key for key in dict.fromkeys(keys) if key not in self._slots]
        for key in self._victims(len(absent), protect):
            self.evict(key)
        return tuple(self._begin(key) for key in absent[: len(self._free)])

    def complete(self, key: ExpertKey) -> None:
        """The expert's bytes have arrived: LOADING becomes READY."""
        slot = self._loading(key)
        self._slots[key] = _Slot(slot.index, ExpertState.READY)
        self._changed(key.layer, moved=False)
        self.policy.loaded(key)

    def abandon(self, key: ExpertKey) -> None:
        """The load failed or was called off: LOADING becomes ABSENT, the slot is free again."""
        slot = self._loading(key)
        for lease in self._leases:
            if lease.pins(key):
                lease.abandoned.add(key.expert)
        self._drop(key, slot)

    def evict(self, key: ExpertKey) -> None:
        """Takes the slot of a READY expert that no lease names; CacheError otherwise."""
        if self.state(key) is not ExpertState.READY or self._pinned(key):
            raise CacheError(f"{key} cannot be evicted: {self.state(key).value}, or in use")
        self._drop(key, self._slots[key])
        self.policy.evicted(key)

    # Inside

    def _victims(self, count: int, protect: Placement | None) -> list[ExpertKey]:
        """What the policy gives up to make `count` slots free; fewer where it has no more."""
        short = count - len(self._free)
        if short <= 0:
            return []
        kept = set() if protect is None else _named(protect)
        ready = (k for k, slot in self._slots.items() if slot.state is ExpertState.READY)
        candidates = [k for k in ready if k not in kept and not self._pinned(k)]
        return self.policy.victims(candidates, short)[:short]

    def _begin(self, key: ExpertKey) -> Load:
        slot = self._free.pop()
        self._slots[key] = _Slot(slot, ExpertState.LOADING)
        self._changed(key.layer, moved=True)
        return Load(key, slot)

    def _loading(self, key: ExpertKey) -> _Slot:
        slot = self._slots.get(key)
        if slot is None or slot.state is not ExpertState.LOADING:
            raise CacheError(f"{key} is {self.state(key).value}, not loading")
        return slot

    def _drop(self, key: ExpertKey, slot: _Slot) -> None:
        del self._slots[key]
        self._free.append(slot.index)
        self._changed(key.layer, moved=True)

    def _changed(self, layer: int, moved: bool) -> None:
        self._residency.pop(layer, None)
        if moved:
            self._layer_slots.pop(layer, None)
            self._versions[layer] += 1

    def _pinned(self, key: ExpertKey) -> bool:
        return any(lease.pins(key) for lease in self._leases)

    def check_integrity(self) -> None:
        """Recomputes everything derived; AssertionError where the books do not agree."""
        held = [slot.index for slot in self._slots.values()]
        assert sorted(held + self._free) == list(range(self.num_slots)), "a slot lost or doubled"
        for key, slot in self._slots.items():
            assert 0 <= key.expert < self._num_experts[key.layer], f"unknown expert {key}"
            assert slot.state is not ExpertState.ABSENT, f"{key} is absent and has a slot"
        for layer, size in self._num_experts.items():
            residency, slots = self.residency(layer), self.slots(layer)
            for e in range(size):
                key = ExpertKey(layer, e)
                assert (e in residency.ready) == (self.state(key) is ExpertState.READY), key
                expected = self._slots[key].index if key in self._slots else -1
                assert slots.slots[e] == expected, f"{key}: slot {slots.slots[e]} is stale"
            assert slots.version == self._versions[layer], f"layer {layer}: stale version"
        for lease in self._leases:
            for e in set(lease.experts) - lease.abandoned:
                key = ExpertKey(lease.placement.layer, e)
                assert key in self._slots, f"{key} is read by a step and has no slot"


def _named(placement: Placement) -> set[ExpertKey]:
    experts = placement.on_device + placement.fetch_first + placement.on_cpu
    return {ExpertKey(placement.layer, e) for e in experts}


def resident_cache(tier: Tier, num_experts: Mapping[int, int], policy: Policy) -> ExpertCache:
    """A cache with a slot for every expert, all READY: the loader has put them there."""
    cache = ExpertCache(tier, num_experts, sum(num_experts.values()), policy)
    keys = [ExpertKey(layer, e) for layer, size in num_experts.items() for e in range(size)]
    for load in cache.prefetch(keys):
        cache.complete(load.key)
    return cache
