"""The cache's books against a plain model of them, under random operations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from moeserve.cache.counters import CacheCounters
from moeserve.cache.expert_cache import (
    CacheError,
    ExpertCache,
    ExpertState,
    LayerSlots,
    Load,
    SlotChange,
    Tier,
    resident_cache,
)
from moeserve.cache.lease import Lease
from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.cache.policies.base import Policy
from moeserve.cache.policies.resident import ResidentPolicy
from moeserve.core import ExpertKey, LayerUse, Placement

LAYERS = {1: 3, 4: 5}
NUMBERS = ExpertNumbers(LAYERS)
KEYS = [ExpertKey(layer, e) for layer, size in LAYERS.items() for e in range(size)]


class OldestFirst(Policy):
    """Gives up what was loaded longest ago, and hears of every arrival and loss once."""

    name = "oldest first"

    def __init__(self) -> None:
        self.order: list[ExpertKey] = []
        self.uses: list[tuple[int, tuple[int, ...]]] = []
        self.observations: list[LayerUse] = []

    def observed(self, use: LayerUse) -> None:
        self.observations.append(use)

    def used(self, layer: int, experts: Sequence[int]) -> None:
        self.uses.append((layer, tuple(experts)))

    def loaded(self, number: int) -> None:
        assert NUMBERS.key(number) not in self.order
        self.order.append(NUMBERS.key(number))

    def evicted(self, number: int) -> None:
        self.order.remove(NUMBERS.key(number))

    def victims(
        self, candidates: Numbers, count: int, incoming: Numbers | None = None
    ) -> list[int]:
        open_ = set(candidates.tolist())
        numbers = [NUMBERS.number(key) for key in self.order]
        return [number for number in numbers if number in open_][:count]


def placement_of(layer: int, read: Iterable[int], fetch: Iterable[int]) -> Placement:
    return Placement(layer, on_device=tuple(read), fetch_first=tuple(fetch))


class OpenLease:
    """A lease whose `with` block is ended by hand."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def open(self) -> LayerSlots:
        return self.lease.__enter__()

    def close(self) -> None:
        self.lease.__exit__(None, None, None)


class CacheMachine(RuleBasedStateMachine):
    """Model: key to slot of what is loading and what is ready, and the pins of every open lease."""

    @initialize(num_slots=st.integers(1, len(KEYS)), floor=st.integers(0, 3))
    def begin(self, num_slots: int, floor: int) -> None:
        self.policy = OldestFirst()
        self.cache = ExpertCache(Tier.DEVICE, LAYERS, num_slots, self.policy, floor)
        self.num_slots = num_slots
        self.floor = floor
        self.slot_numbers = set(range(num_slots))
        self.given_up: set[int] = set()
        self.lingering: list[tuple[list[bool], set[ExpertKey]]] = []
        self.unproven: set[ExpertKey] = set()
        self.counts = dict.fromkeys((f.name for f in fields(CacheCounters)), 0)
        self.loading: dict[ExpertKey, int] = {}
        self.ready: dict[ExpertKey, int] = {}
        self.leases: list[tuple[OpenLease, set[ExpertKey]]] = []

    def teardown(self) -> None:
        for stack, _ in getattr(self, "leases", []):
            stack.close()

    @property
    def pinned(self) -> set[ExpertKey]:
        open_ = {key for _, keys in self.leases for key in keys}
        return open_ | {key for done, keys in self.lingering for key in keys if not done[0]}

    def held(self, layer: int) -> int:
        return sum(key.layer == layer for key in [*self.loading, *self.ready])

    def evictable(self, kept: set[ExpertKey], layer: int | None) -> int:
        """How many slots can be had of the ready experts; layer: whose demand it is, if any."""
        total = 0
        for other in LAYERS:
            free = sum(key.layer == other and key not in kept for key in self.ready)
            total += free if layer is not None else min(free, max(0, self.held(other) - self.floor))
        return total

    def lose(self, key: ExpertKey) -> None:
        del self.ready[key]
        self.counts["evictions"] += 1
        self.prove(key, "wasted")

    def prove(self, key: ExpertKey, verdict: str) -> None:
        if key in self.unproven:
            self.unproven.remove(key)
            self.counts[f"prefetches_{verdict}"] += 1

    def follow_losses(self) -> set[ExpertKey]:
        """Evictions that the model does not foresee one by one."""
        lost = {k for k in self.ready if self.cache.state(k) is ExpertState.ABSENT}
        for key in lost:
            self.lose(key)
        return lost

    def started(self, loads: Sequence[Load], kept: set[ExpertKey]) -> None:
        """Follows loads into the model: a slot came from the free ones or from a victim."""
        lost = self.follow_losses()
        assert not lost & kept, "a pinned or protected expert was evicted"
        taken = set(self.loading.values()) | set(self.ready.values())
        for load in loads:
            assert load.key not in self.loading
            assert load.key not in self.ready
            assert load.slot not in taken, "a slot given twice"
            assert load.slot in self.slot_numbers
            taken.add(load.slot)
            self.loading[load.key] = load.slot

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=6), data=st.data())
    def prefetch(self, keys: list[ExpertKey], data: st.DataObject) -> None:
        protect = None
        kept = self.pinned | set(self.loading)
        if data.draw(st.booleans()):
            layer = data.draw(st.sampled_from(sorted(LAYERS)))
            experts = data.draw(st.sets(st.integers(0, LAYERS[layer] - 1)))
            protect = Placement(layer, on_cpu=tuple(experts))
            kept |= {ExpertKey(layer, e) for e in experts}
        absent = [k for k in dict.fromkeys(keys) if k not in self.loading and k not in self.ready]
        available = self.cache.num_free + self.evictable(kept, None)
        before = {layer: self.held(layer) for layer in LAYERS}
        loads = self.cache.prefetch(keys, protect)
        assert [load.key for load in loads] == absent[:available]
        self.started(loads, kept)
        self.unproven |= {load.key for load in loads}
        self.counts["prefetches_begun"] += len(loads)
        for layer in LAYERS:
            assert self.held(layer) >= min(before[layer], self.floor), "below the floor"

    @rule(data=st.data(), layer=st.sampled_from(sorted(LAYERS)))
    def observe(self, data: st.DataObject, layer: int) -> None:
        rows = data.draw(
            st.lists(st.integers(0, 2), min_size=LAYERS[layer], max_size=LAYERS[layer])
        )
        use = LayerUse(layer, np.array(rows, np.int32), np.array(rows, np.float32))
        self.cache.observe(use)
        if not self.cache.holds_everything:
            assert self.policy.observations[-1] is use
        for key in (ExpertKey(layer, e) for e, n in enumerate(rows) if n):
            name = "hits" if key in self.ready else "late" if key in self.loading else "misses"
            self.counts[name] += 1
            self.prove(key, "useful")

    @rule(num_slots=st.integers(1, len(KEYS)))
    def resize(self, num_slots: int) -> None:
        spare = self.evictable(self.pinned, layer=0)
        used = len(self.loading) + len(self.ready)
        change = self.cache.resize(num_slots)
        self.num_slots = num_slots
        self.follow_losses()
        assert len(self.loading) + len(self.ready) == min(used, max(num_slots, used - spare))
        self.follow_slots(change)

    def follow_slots(self, change: SlotChange) -> None:
        assert not set(change.added) & (self.slot_numbers | set(change.given_up))
        assert set(change.given_up) <= self.slot_numbers
        self.slot_numbers |= set(change.added)
        self.slot_numbers -= set(change.given_up)
        occupied = set(self.loading.values()) | set(self.ready.values())
        assert occupied <= self.slot_numbers, "an expert stands in a slot that was given up"
        assert len(self.slot_numbers) == max(self.num_slots, len(occupied))

    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        layer = data.draw(st.sampled_from(sorted(LAYERS)))
        here = [k.expert for k in self.ready if k.layer == layer]
        read = data.draw(st.sets(st.sampled_from(here))) if here else set()
        others = sorted(set(range(LAYERS[layer])) - read)
        fetch = data.draw(st.sets(st.sampled_from(others))) if others else set()
        pins = {ExpertKey(layer, e) for e in read | fetch}
        absent = {k for k in pins if k not in self.loading and k not in self.ready}
        held = self.pinned | pins | set(self.loading)
        available = self.cache.num_free + self.evictable(held, layer)
        placement = placement_of(layer, sorted(read), sorted(fetch))
        stack = OpenLease(self.cache.acquire(placement))
        if len(absent) > available:
            with pytest.raises(CacheError, match=f"layer {layer}"):
                stack.open()
            return  # and nothing has changed: books_agree
        uses = len(self.policy.uses)
        slots = stack.open()
        assert self.policy.uses[uses:] == [(layer, tuple(sorted(read) + sorted(fetch)))]
        assert {load.key for load in slots.loads} == absent
        self.started(slots.loads, self.pinned | pins)
        self.leases.append((stack, pins))
        for key in pins:
            expected = self.ready.get(key, self.loading.get(key))
            assert slots.slots[key.expert] == expected

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.leases) - 1))
        stack, _ = self.leases.pop(number)
        stack.close()
        self.settled()

    def settled(self) -> None:
        """A release may let slots go that are owed."""
        given_up = self.cache.take_given_up()
        self.follow_losses()
        self.follow_slots(SlotChange((), given_up))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release_but_read_on(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.leases) - 1))
        stack, pins = self.leases.pop(number)
        done = [False]
        stack.lease.until(lambda: done[0])
        stack.close()
        self.lingering.append((done, pins))

    @precondition(lambda self: self.lingering)
    @rule()
    def reader_ends(self) -> None:
        done, _ = self.lingering.pop(0)
        done[0] = True
        self.settled()

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), arrives=st.booleans())
    def load_ends(self, data: st.DataObject, arrives: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.loading)))
        slot = self.loading.pop(key)
        if arrives:
            self.ready[key] = slot
            self.cache.complete(key)
        else:
            self.cache.abandon(key)
            self.prove(key, "wasted")
            for _, pins in self.leases + self.lingering:
                pins.discard(key)
        self.settled()

    @rule(key=st.sampled_from(KEYS))
    def pin(self, key: ExpertKey) -> None:
        uses = len(self.policy.uses)
        if key in self.ready:
            self.leases.append((OpenLease(self.cache.pin(key)), {key}))
        else:
            with pytest.raises(CacheError, match="not ready"):
                self.cache.pin(key)
        assert len(self.policy.uses) == uses, "a copy is no use"

    @rule(key=st.sampled_from(KEYS))
    def evict(self, key: ExpertKey) -> None:
        if key in self.ready and key not in self.pinned:
            self.cache.evict(key)
            self.lose(key)
        else:
            with pytest.raises(CacheError):
                self.cache.evict(key)
        self.settled()

    @rule(key=st.sampled_from(KEYS), arrives=st.booleans())
    def end_a_load_that_is_none(self, key: ExpertKey, arrives: bool) -> None:
        if key not in self.loading:
            with pytest.raises(CacheError, match="not loading"):
                (self.cache.complete if arrives else self.cache.abandon)(key)

    @rule(layer=st.sampled_from(sorted(LAYERS)))
    def read_what_is_not_ready(self, layer: int) -> None:
        missing = [e for e in range(LAYERS[layer]) if ExpertKey(layer, e) not in self.ready]
        for e in missing:
            with (
                pytest.raises(CacheError, match="not ready"),
                self.cache.acquire(placement_of(layer, [e], [])),
            ):
                raise AssertionError("a lease on an expert that is not there")

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        used = len(self.loading) + len(self.ready)
        assert self.cache.num_free == max(0, self.num_slots - used)
        assert self.cache.num_owed == max(0, used - self.num_slots)
        assert self.cache.counters.totals() == self.counts
        assert sorted(self.policy.order) == sorted(self.ready)
        for layer, size in LAYERS.items():
            keys = [ExpertKey(layer, e) for e in range(size)]
            residency = self.cache.residency(layer)
            assert residency.ready == {k.expert for k in keys if k in self.ready}
            assert residency.complete == (len(residency.ready) == size)
            held = {**self.loading, **self.ready}
            assert self.cache.slots(layer).slots == tuple(held.get(k, -1) for k in keys)
            for key in keys:
                expected = (
                    ExpertState.READY
                    if key in self.ready
                    else ExpertState.LOADING
                    if key in self.loading
                    else ExpertState.ABSENT
                )
                assert self.cache.state(key) is expected


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestCacheMachine = CacheMachine.TestCase


def test_everything_resident() -> None:
    cache = resident_cache(Tier.HOST, LAYERS, ResidentPolicy())
    cache.check_integrity()
    assert all(cache.state(key) is ExpertState.READY for key in KEYS)
    assert cache.num_free == 0
    for layer, size in LAYERS.items():
        assert cache.residency(layer).complete
        slots = cache.slots(layer).slots
        assert slots == tuple(range(slots[0], slots[0] + size)), "one layer's slots stand together"


def test_a_resident_layer_is_found_and_not_computed() -> None:
    """What a step asks for is the same object every time, and there are no loads."""
    cache = resident_cache(Tier.HOST, LAYERS, ResidentPolicy())
    placement = Placement(4, on_cpu=tuple(range(5)))
    with cache.acquire(placement) as first:
        pass
    with cache.acquire(placement) as second:
        assert second is first is cache.slots(4)
        assert second.loads == ()
    assert cache.residency(4) is cache.residency(4)


def test_a_step_that_fails_gives_its_lease_back() -> None:
    cache = ExpertCache(Tier.HOST, LAYERS, 2, OldestFirst())
    for load in cache.prefetch(KEYS[:2]):
        cache.complete(load.key)
    with pytest.raises(RuntimeError), cache.acquire(Placement(1, on_cpu=(0, 1))):
        raise RuntimeError("the step failed")
    cache.evict(KEYS[0])
    cache.check_integrity()


def test_version_changes_with_the_slots() -> None:
    cache = ExpertCache(Tier.HOST, LAYERS, 2, OldestFirst())
    seen: list[LayerSlots] = [cache.slots(1)]
    for load in cache.prefetch(KEYS[:2]):
        cache.complete(load.key)
    seen.append(cache.slots(1))
    cache.evict(KEYS[0])
    seen.append(cache.slots(1))
    assert [s.slots for s in seen] == [(-1, -1, -1), (0, 1, -1), (-1, 1, -1)]
    assert len({s.version for s in seen}) == 3


def test_resident_policy_gives_nothing_up() -> None:
    cache = ExpertCache(Tier.HOST, LAYERS, 3, ResidentPolicy())
    for load in cache.prefetch(KEYS):
        cache.complete(load.key)
    assert cache.prefetch(KEYS) == ()
    with (
        pytest.raises(CacheError, match="5 experts must be fetched, 0 of 3 slots"),
        cache.acquire(Placement(4, fetch_first=(0, 1, 2, 3, 4))),
    ):
        raise AssertionError("five experts in no slot")
    cache.check_integrity()
    assert cache.residency(1).complete
