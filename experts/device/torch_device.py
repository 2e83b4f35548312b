"""A device that torch has: slots in its memory, copies beside its work, experts through torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.cache.record_copy import Urgency
from moeserve.cache.transfer import Arrival, Transfers
from moeserve.cache.transfer_stats import TransferStats
from moeserve.cache.types import LayerSlots, Load
from moeserve.core import ExpertKey, Routing
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.experts.device.device import Device
from moeserve.experts.device.torch_experts import PairSums, TorchExperts
from moeserve.experts.device.torch_link import (
    CHUNK_BYTES,
    NUM_THREADS,
    HostRecords,
    TorchSlots,
)
from moeserve.experts.host_side import HostSide
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.watch import Watch


def wall_us() -> float:
    """The clock that its work goes by."""
    return time.perf_counter() * 1e6


class TorchDevice(Device):
    """Work is launched in its order and runs by itself: who asks for its results waits for them.

    A slot may be written again when everything that was launched before is done (`is_idle`).
    """

    def __init__(
        self,
        device: torch.device,
        num_slots: int,
        layers: Mapping[int, PackedExperts],
        source: HostSide,
        watch: Watch | None = None,
    ) -> None:
        """layers: the experts of each MoE layer; only their shapes are used. Raises MemoryError."""
        self.device = device
        self.layers = {layer: TorchExperts(experts) for layer, experts in layers.items()}
        self.watch = watch or Watch()
        self._num_experts = {layer: each.spec.num_experts for layer, each in layers.items()}
        num_bytes = {layer: each.record_bytes for layer, each in self.layers.items()}
        self._slots = TorchSlots(max(num_bytes.values()), num_slots, device)
        self._source = source
        self._records = HostRecords(num_bytes, device)
        self._transfers = Transfers(
            self._records,
            self._slots.__getitem__,
            NUM_THREADS,
            CHUNK_BYTES,
            self.watch.timeline,
        )
        self._costs: Mapping[int, CostModel] = {}
        self._coming: dict[ExpertKey, Load] = {}
        self._arrived: list[Load] = []
        self._holds: dict[int, ExpertKey] = {}  # slots that were written to the end
        self._launched: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def slots(self) -> TorchSlots:
        return self._slots

    @property
    def source(self) -> HostSide:
        return self._source

    def now_us(self) -> float:
        return wall_us()

    def know_costs(self, costs: Mapping[int, CostModel]) -> None:
        """costs: of the experts of each layer, with this device and its link."""
        self._costs = costs

    def costs(self, layer: int) -> CostModel:
        return self._costs[layer]

    # Copies

    def prefetch(self, loads: Sequence[Load]) -> None:
        self._begin(loads, Urgency.PREFETCH)

    def demand(self, loads: Sequence[Load]) -> None:
        self._begin(loads, Urgency.DEMAND)

    def promote(self, keys: Iterable[ExpertKey]) -> None:
        self._transfers.promote(keys)

    def cancel_prefetches(self) -> list[Load]:
        called_off = self._transfers.cancel_prefetches()
        for load in called_off:
            self._end(load)
        return called_off

    def finished(self) -> list[Load]:
        self._take(self._transfers.finished())
        arrived, self._arrived = self._arrived, []
        return arrived

    def wait_for_copy(self) -> bool:
        if self._coming and not self._arrived:
            self._take(self._transfers.wait())
        return bool(self._arrived)

    def copying(self) -> set[ExpertKey]:
        return {*self._coming, *(load.key for load in self._arrived)}

    def loading_us(self, layer: int) -> dict[int, float]:
        return {key.expert: self._copy_us(key) for key in self._coming if key.layer == layer}

    def link_left_us(self) -> float:
        return sum(map(self._copy_us, self._coming))

    def link_busy_s(self) -> float:
        return self._transfers.stats.busy_s

    def link_stats(self) -> TransferStats:
        return self._transfers.snapshot()

    # Work

    def begin(self, layer: int, x: Tensor, routing: Routing) -> LayerWork:
        """The work of one layer's step. x: [T, H] on the device; routing: on the CPU."""
        self._count_done()
        return LayerWork(self, layer, PairSums(x, routing, self._num_experts[layer]))

    def compute(
        self, sums: PairSums, layer: int, experts: Sequence[int], slots: LayerSlots
    ) -> None:
        """Launches those experts, which stand in their slots."""
        stored = self.layers[layer]
        with self._counted(layer):
            for batch, pairs in sums.rows.batches(experts, stored.most_at_a_time(sums.dtype)):
                places = [slots.slots[expert] for expert in batch]
                for expert, slot in zip(batch, places, strict=True):
                    key = ExpertKey(layer, expert)
                    assert self._holds.get(slot) == key, f"slot {slot} is read for {key}"
                sums.add(stored, pairs, self._slots.records(places, stored.record_bytes))

    def has(self, key: ExpertKey) -> bool:
        """Whether no copy of it is under way, after what has arrived by now."""
        self._take(self._transfers.finished())
        return key not in self._coming

    def wait_for(self, layer: int) -> None:
        """Until one more copy is complete, of those that are under way. layer: whose step waits."""
        with self.watch.timeline.span("stall", layer=layer):
            self._take(self._transfers.wait(layer))

    def is_idle(self) -> bool:
        self._count_done()
        return not self._launched

    def synchronize(self) -> None:
        """Until all that was launched is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def write(self, slot: int, record: NDArray[np.uint8]) -> None:
        """Fills a slot that holds nothing, past the queue of copies; to measure them."""
        self._records.copy(record, self._slots[slot][: len(record)])

    def close(self) -> None:
        self._transfers.close()
        self.synchronize()

    @contextmanager
    def _counted(self, layer: int) -> Iterator[None]:
        """Time of work that is launched meanwhile."""
        if self.device.type != "cuda":
            begun_s = time.perf_counter()
            yield
            self.watch.device_s[layer] += time.perf_counter() - begun_s
            return
        begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begins.record(torch.cuda.current_stream(self.device))
        yield
        ends.record(torch.cuda.current_stream(self.device))
        self._launched.append((layer, begins, ends))

    def _count_done(self) -> None:
        while self._launched and self._launched[0][2].query():
            layer, begins, ends = self._launched.popleft()
            self.watch.device_s[layer] += begins.elapsed_time(ends) / 1e3

    # Books of the copies

    def _begin(self, loads: Sequence[Load], urgency: Urgency) -> None:
        now_us = self.now_us()
        for load in loads:
            self._coming[load.key] = load
            self._holds.pop(load.slot, None)
            self._records.lend(load.key, self._source.record(load.key))
            self._source.read_begins(load.key, now_us)
        if loads:
            self._transfers.start(loads, urgency)

    def _take(self, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            if arrival.error is not None:  # no slot can be relied on: the engine ends
                raise RuntimeError(str(arrival.error))
            self._end(arrival.load)
            self._holds[arrival.load.slot] = arrival.load.key
            self._arrived.append(arrival.load)

    def _end(self, load: Load) -> None:
        del self._coming[load.key]
        self._records.give_back(load.key)
        self._source.read_ends(load.key, self.now_us())

    def _copy_us(self, key: ExpertKey) -> float:
        costs = self._costs[key.layer]
        return costs.transfer_us(costs.expert_bytes)


class LayerWork:
    """The experts of one layer's step that the device computes."""

    def __init__(self, device: TorchDevice, layer: int, sums: PairSums) -> None:
        self._device = device
        self._layer = layer
        self._sums = sums
        self._waiting: list[int] = []  # for their copies
        self._slots: LayerSlots | None = None

    def submit(self, experts: Sequence[int], slots: LayerSlots) -> None:
        """Launches what stands in its slot; the rest when it does, at the latest by `total`. What
        does not stand there must have been ordered."""
        self._slots = slots
        self._waiting += experts
        self._launch_ready()

    def total(self) -> Tensor:
        """[T, H] float32 on the device: the weighted sums over what was submitted."""
        while self._waiting:
            if not self._launch_ready():
                self._device.wait_for(self._layer)
        return self._sums.total()

    def _launch_ready(self) -> bool:
        has = self._device.has
        ready = [e for e in self._waiting if has(ExpertKey(self._layer, e))]
        if ready:
            assert self._slots is not None
            self._waiting = [e for e in self._waiting if e not in ready]
            self._device.compute(self._sums, self._layer, ready, self._slots)
        return bool(ready)
