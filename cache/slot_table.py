"""Who stands in which slot, and whether it may be read: the tables of one tier's cache."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.cache.slot_pool import SlotPool
from moeserve.cache.types import CacheError, ExpertState, LayerSlots, Load, Residency, Tier
from moeserve.core import ExpertKey

_ABSENT, _LOADING, _READY = 0, 1, 2
_STATES = (ExpertState.ABSENT, ExpertState.LOADING, ExpertState.READY)


class SlotTable:
    """States and slots of all experts of one tier, in flat arrays by their numbers.

    Knows nothing of who reads and of what is worth keeping: `ExpertCache` decides, this notes.
    """

    def __init__(self, tier: Tier, numbers: ExpertNumbers, num_slots: int) -> None:
        self.tier = tier
        self.numbers = numbers
        self.pool = SlotPool(num_slots)
        #: [L] slots that each layer's experts have
        self.held = np.zeros(len(numbers.layers), np.int64)
        self._state = np.zeros(numbers.total, np.int8)
        self._slot = np.full(numbers.total, -1, np.int32)
        self._versions = dict.fromkeys(numbers.layers, 0)
        # Derived when first asked for, dropped by _changed: in the steady state of a resident
        # layer both are found, not computed.
        self._residency: dict[int, Residency] = {}
        self._layer_slots: dict[int, LayerSlots] = {}

    def state(self, key: ExpertKey) -> ExpertState:
        return _STATES[self._state[self.numbers.number(key)]]

    def residency(self, layer: int) -> Residency:
        """Which experts of the layer are READY."""
        found = self._residency.get(layer)
        if found is None:
            state = self._state[self.numbers.span_of[layer]]
            ready = frozenset(np.flatnonzero(state == _READY).tolist())
            found = Residency(layer, self.tier, len(state), ready)
            self._residency[layer] = found
        return found

    def slots(self, layer: int) -> LayerSlots:
        """Where the layer's experts stand, READY or LOADING."""
        found = self._layer_slots.get(layer)
        if found is None:
            slots = tuple(self._slot[self.numbers.span_of[layer]].tolist())
            found = LayerSlots(layer, slots, self._versions[layer])
            self._layer_slots[layer] = found
        return found

    def counted(self, layer: int, wanted: NDArray[np.bool_]) -> tuple[int, int, int]:
        """How many of a layer's wanted experts, [E], are absent, loading and ready."""
        state = self._state[self.numbers.span_of[layer]][wanted]
        absent, loading, ready = np.bincount(state, minlength=3).tolist()
        return absent, loading, ready

    def absent(self) -> Numbers:
        found: Numbers = np.flatnonzero(self._state == _ABSENT)
        return found

    def which_absent(self, numbers: Numbers) -> NDArray[np.bool_]:
        """Of experts by their numbers, [n]: those that have no slot, [n]."""
        found: NDArray[np.bool_] = self._state[numbers] == _ABSENT
        return found

    def which_ready(self, numbers: Numbers) -> NDArray[np.bool_]:
        """Of experts by their numbers, [n]: those that are READY, [n]."""
        found: NDArray[np.bool_] = self._state[numbers] == _READY
        return found

    def ready(self) -> NDArray[np.bool_]:
        """[N] a mask of the caller's own: which experts are READY."""
        found: NDArray[np.bool_] = self._state == _READY
        return found

    def begin_load(self, number: int) -> Load:
        """ABSENT becomes LOADING, in the lowest free slot."""
        key = self.numbers.key(number)
        slot = self.pool.take()
        self._state[number] = _LOADING
        self._slot[number] = slot
        self.held[self.numbers.rank[number]] += 1
        self._changed(key.layer, moved=True)
        return Load(key, slot)

    def loading(self, key: ExpertKey) -> int:
        """Number of an expert that is LOADING; CacheError where it is not."""
        number = self.numbers.number(key)
        if self._state[number] != _LOADING:
            raise CacheError(f"{key} is {self.state(key).value}, not loading")
        return number

    def arrived(self, number: int) -> None:
        """LOADING becomes READY."""
        self._state[number] = _READY
        self._changed(self.numbers.key(number).layer, moved=False)

    def drop(self, number: int) -> None:
        """The expert becomes ABSENT, its slot free, or gone where slots are owed."""
        rank = int(self.numbers.rank[number])
        self.pool.give(int(self._slot[number]))
        self._state[number] = _ABSENT
        self._slot[number] = -1
        self.held[rank] -= 1
        self._changed(self.numbers.layers[rank], moved=True)

    def _changed(self, layer: int, moved: bool) -> None:
        self._residency.pop(layer, None)
        if moved:
            self._layer_slots.pop(layer, None)
            self._versions[layer] += 1

    def check_integrity(self, read: Iterable[ExpertKey], unproven: NDArray[np.bool_]) -> None:
        """Recomputes everything derived; AssertionError where the books do not agree.

        read: experts that a step reads. unproven: [N] prefetched, not wanted so far.
        """
        held = self._slot >= 0
        assert np.array_equal(held, self._state != _ABSENT), "a slot without a state"
        self.pool.check_integrity(self._slot[held].tolist())
        per_layer = np.bincount(self.numbers.rank[held], minlength=len(self.numbers.layers))
        assert np.array_equal(per_layer, self.held), "slots per layer miscounted"
        assert not (unproven & ~held).any(), "a prefetch that holds no slot"
        for layer, span in self.numbers.span_of.items():
            residency, slots = self.residency(layer), self.slots(layer)
            assert residency.ready == set(np.flatnonzero(self._state[span] == _READY).tolist())
            assert slots.slots == tuple(self._slot[span].tolist()), f"layer {layer}: stale slots"
            assert slots.version == self._versions[layer], f"layer {layer}: stale version"
        for key in read:
            assert held[self.numbers.number(key)], f"{key} is read by a step and has no slot"
