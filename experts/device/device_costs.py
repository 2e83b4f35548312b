"""What experts cost on a device that is there, and their copies: measured on a loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import torch

from moeserve.core import Routing
from moeserve.experts.cpu_costs import start_and_more_us
from moeserve.experts.device.torch_device import TorchDevice
from moeserve.experts.device.torch_experts import PairSums

#: jobs per point, of which the median counts, after one that is not counted
NUM_REPEATS = 5
#: experts of a job beyond the first
NUM_MORE = 3


@dataclass(frozen=True)
class DeviceCosts:
    """Microseconds. start: what the first expert of a job costs beyond a further one. one_more: of
    a further expert, for each of ROWS. copy: of a record of record_bytes."""

    start_us: float
    one_more_us: tuple[float, ...]
    copy_us: float
    record_bytes: int


def measure_device(
    device: TorchDevice, layer: int, hidden_size: int, dtype: torch.dtype
) -> DeviceCosts:
    """On experts of one layer, in slots that hold nothing yet. Takes a fraction of a second on a
    GPU; where torch on the CPU stands in for one, as long as its products take."""
    num_slots = min(len(device.slots), 2 * (1 + NUM_MORE))
    jobs = _Jobs(device, layer, hidden_size, dtype, num_slots)
    copy_us = median(jobs.copy_us(slot % num_slots) for slot in range(NUM_REPEATS + num_slots))
    start_us, more_us = start_and_more_us(jobs.median_us, min(NUM_MORE, num_slots - 1))
    return DeviceCosts(start_us, more_us, copy_us, device.layers[layer].record_bytes)


class _Jobs:
    """Slots take turns, so that few records find themselves in the device's caches."""

    def __init__(
        self,
        device: TorchDevice,
        layer: int,
        hidden_size: int,
        dtype: torch.dtype,
        num_slots: int,
    ) -> None:
        self._device = device
        self._layer = device.layers[layer]
        self._hidden = hidden_size
        self._dtype = dtype
        self._turns = cycle(range(num_slots))
        self._host = torch.zeros(self._layer.record_bytes, dtype=torch.uint8).numpy()

    def median_us(self, num_experts: int, num_rows: int) -> float:
        """Of a job in which num_rows rows choose the same num_experts experts."""
        ids = torch.arange(num_experts).expand(num_rows, -1).contiguous()  # [T, K]
        routing = Routing(ids, torch.full(ids.shape, 1.0 / num_experts))
        x = torch.zeros(num_rows, self._hidden, dtype=self._dtype, device=self._device.device)

        def run() -> None:
            sums = PairSums(x, routing, num_experts)
            for batch, pairs in sums.rows.batches(range(num_experts), num_experts):
                slots = [next(self._turns) for _ in batch]
                records = self._device.slots.records(slots, self._layer.record_bytes)
                sums.add(self._layer, pairs, records)
            sums.total()

        self._us(run)
        return median(self._us(run) for _ in range(NUM_REPEATS))

    def copy_us(self, slot: int) -> float:
        return self._us(lambda: self._device.write(slot, self._host))

    def _us(self, call: Callable[[], object]) -> float:
        self._device.synchronize()
        begun_s = time.perf_counter()
        call()
        self._device.synchronize()
        return (time.perf_counter() - begun_s) * 1e6
