"""A device that is not there: slots of its own in memory, a link and a processor with a rate each.

Records are really copied into slots, and the experts really computed, by the native kernels from
the slots' bytes; so tokens are bit for bit those of the CPU alone. Only time is emulated (`clock`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.tiers.host_slots import HostSlots
from moeserve.cache.transfer_stats import TransferStats
from moeserve.cache.types import LayerSlots, Load
from moeserve.core import ExpertKey
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_parts import NativeParts
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.experts.device.clock import EmulatedClock
from moeserve.experts.device.device import Device
from moeserve.experts.device.emulated_link import EMULATED, EmulatedLink
from moeserve.experts.device.slot_guard import SlotGuard
from moeserve.experts.host_side import HostSide
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.watch import Watch


@dataclass(frozen=True)
class _Layer:
    """native: the layer's experts as the device finds them; a record is set while it is read."""

    native: _native.PackedExperts
    record_bytes: int
    costs: CostModel


class EmulatedDevice(Device):
    """Work submitted to it runs one after another, copies beside it."""

    def __init__(
        self,
        clock: EmulatedClock,
        slots: HostSlots,
        source: HostSide,
        watch: Watch | None = None,
    ) -> None:
        """source: host memory, which copies are made from. watch: gets the emulated times."""
        self.clock = clock
        self._slots = slots
        self._source = source
        self.guard = SlotGuard()
        self.watch = watch or Watch()
        self.link = EmulatedLink(self._write_begins, self._write_ends, self.watch.timeline)
        self.busy_us = 0.0
        self._layers: dict[int, _Layer] = {}
        self._free_us = 0.0

    @property
    def slots(self) -> HostSlots:
        return self._slots

    @property
    def source(self) -> HostSide:
        return self._source

    def now_us(self) -> float:
        return self.clock.now_us()

    def add_layer(self, layer: int, experts: PackedExperts, costs: CostModel) -> None:
        """costs: of the experts of this layer, with device and link."""
        self._layers[layer] = _Layer(experts.without_records(), experts.record_bytes, costs)

    def costs(self, layer: int) -> CostModel:
        return self._layers[layer].costs

    def prefetch(self, loads: Sequence[Load]) -> None:
        self.link.advance(self.clock.now_us())
        for load in loads:
            self.link.prefetch(load, *self._copy(load.key))

    def demand(self, loads: Sequence[Load]) -> None:
        for load in loads:
            self.link.demand(load, *self._copy(load.key), self.clock.now_us())

    def promote(self, keys: Iterable[ExpertKey]) -> None:
        now_us = self.clock.now_us()
        for key in keys:
            self.link.promote(key, now_us)

    def cancel_prefetches(self) -> list[Load]:
        return self.link.cancel_prefetches()

    def finished(self) -> list[Load]:
        return self.link.finished(self.clock.now_us())

    def wait_for_copy(self) -> bool:
        end_us = self.link.next_end_us(self.clock.now_us())
        if end_us is not None:
            self.clock.wait_until(end_us)
        return end_us is not None

    def copying(self) -> set[ExpertKey]:
        return self.link.keys()

    def loading_us(self, layer: int) -> dict[int, float]:
        self.link.advance(self.clock.now_us())
        return self.link.left_us(layer)

    def link_left_us(self) -> float:
        return self.link.all_left_us(self.clock.now_us())

    def link_busy_s(self) -> float:
        return self.link.stats.busy_s

    def link_stats(self) -> TransferStats:
        return self.link.stats

    def end_layer(self) -> None:
        self.clock.end_layer()

    def begin_layer(self, layer: int) -> None:
        """Submits its shared experts: their time alone, for who runs them is not the executor."""
        us = self._layers[layer].costs.shared_us
        if us:
            start_us = self._begin(self._layers[layer].costs)
            self._free_us = start_us + us
            self.busy_us += us
            self.watch.timeline.add(
                "shared experts",
                "device",
                start_us / 1e6,
                self._free_us / 1e6,
                EMULATED,
                layer=layer,
            )

    def submit(
        self,
        parts: NativeParts,
        rows: NDArray[np.int64],
        experts: Sequence[int],
        slots: LayerSlots,
    ) -> None:
        """Computes experts of one layer into `parts`, one after another as their copies arrive.

        rows: [E], of each expert. What does not stand in its slot must have been demanded.
        """
        if not experts:
            return
        layer = self._layers[slots.layer]
        self._reckon(layer, rows, experts, slots)
        with self.clock.left_out():
            for expert in experts:
                record = self.slots[slots.slots[expert]][: layer.record_bytes]
                layer.native.set_record(expert, record)
            parts.add(experts, layer.native)
            for expert in experts:
                layer.native.clear_record(expert)

    def wait(self, layer: int) -> None:
        """Until what was submitted is done. layer: whose step waits."""
        self.link.stats.waited(layer, max(0.0, self._free_us - self.clock.now_us()) / 1e6)
        self.clock.wait_until(self._free_us)

    def is_idle(self) -> bool:
        return self.clock.now_us() >= self._free_us

    def _reckon(
        self, layer: _Layer, rows: NDArray[np.int64], experts: Sequence[int], slots: LayerSlots
    ) -> None:
        """Puts the work on the device's timeline, and writes down the reads of slots."""
        costs = layer.costs
        now_us = self._begin(costs)
        for expert in experts:
            key = ExpertKey(slots.layer, expert)
            start_us = max(now_us, self.link.arrives_us(key))
            work_us = costs.device_us(int(rows[expert]))
            now_us = start_us + work_us
            self.busy_us += work_us
            self.watch.device_s[key.layer] += work_us / 1e6
            self.watch.timeline.add(
                "experts", "device", start_us / 1e6, now_us / 1e6, EMULATED, **key._asdict()
            )
            self.guard.read(slots.slots[expert], key, start_us, now_us)
        self._free_us = now_us

    def _begin(self, costs: CostModel) -> float:
        """When work that is submitted now begins: launching it is hidden by work before it."""
        now_us = self.clock.now_us()
        start_us = max(now_us + costs.device_start_us, self._free_us)
        self.busy_us += start_us - max(now_us, self._free_us)
        return start_us

    def _copy(self, key: ExpertKey) -> tuple[int, float]:
        """Bytes and time of a copy."""
        costs = self._layers[key.layer].costs
        return costs.expert_bytes, costs.transfer_us(costs.expert_bytes)

    def _write_begins(self, load: Load, us: float) -> None:
        self.guard.write_begins(load.slot, load.key, us)
        self.source.read_begins(load.key, us)

    def _write_ends(self, load: Load, us: float) -> None:
        self.guard.write_ends(load.slot, load.key, us)
        self.source.read_ends(load.key, us)
        with self.clock.left_out():
            num_bytes = self._layers[load.key.layer].record_bytes
            self.slots[load.slot][:num_bytes] = self.source.record(load.key)[:num_bytes]
