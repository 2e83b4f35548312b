"""Copies of records from host memory into slots on a device, through torch.

The threads and their order are those of every other transfer (`cache.transfer`): what a step waits
for before guesses, chunk by chunk. On CUDA a chunk goes through pinned memory of its thread, on a
stream of its own, beside whatever the device computes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.cache.tiers.source import RecordCheck, StoreError
from moeserve.core import ConfigError, ExpertKey

#: what one thread copies at a time: a demand waits for that much of a prefetch. A third of a
#: millisecond on PCIe 4, and long beside what a chunk costs in Python
CHUNK_BYTES = 8 << 20
#: one fills its pinned memory while the other's is on its way
NUM_THREADS = 2


class TorchSlots:
    """Slots of equal size on a device, numbered from 0. Memory is kept until the end."""

    def __init__(self, slot_bytes: int, num_slots: int, device: torch.device) -> None:
        """Raises MemoryError."""
        self.slot_bytes = slot_bytes
        self._device = device
        self._slots: list[Tensor] = []
        self.grow(num_slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> Tensor:
        """[slot_bytes] uint8."""
        return self._slots[slot]

    def grow(self, num_slots: int) -> None:
        """Makes sure that there are at least so many. MemoryError: there is no room."""
        more = num_slots - len(self._slots)
        if more <= 0:
            return
        shape = (more, self.slot_bytes)
        try:
            with torch.inference_mode(False):  # transfer threads write them outside of it
                region = torch.empty(shape, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, a plain one on the CPU
            raise MemoryError(
                f"no {more * self.slot_bytes} bytes on {self._device} for slots of experts"
            ) from error
        self._slots.extend(region)

    def give_back(self, slot: int) -> None:
        """The memory stays: it is a part of a larger piece."""

    def take_back(self, slot: int) -> None:
        """As above."""

    def records(self, slots: list[int], num_bytes: int) -> Tensor:
        """[n, num_bytes]: a copy of what stands there."""
        return torch.stack([self._slots[slot][:num_bytes] for slot in slots])


class _NoCheck(RecordCheck):
    """Host memory holds what was checked when it came there."""

    def update(self, piece: memoryview) -> None:
        """Nothing is summed."""

    def finish(self) -> None:
        """Nothing is compared."""


_NO_CHECK = _NoCheck()


class HostRecords:
    """Records in host memory as transfers read them. `lend` and `give_back` are for the engine's
    thread; what a transfer reads has been lent before it was started."""

    def __init__(self, num_bytes: Mapping[int, int], device: torch.device) -> None:
        """num_bytes: of a record, by layer."""
        self._num_bytes = num_bytes
        self._device = device
        self._records: dict[ExpertKey, NDArray[np.uint8]] = {}
        self._own = threading.local()

    def lend(self, key: ExpertKey, record: NDArray[np.uint8]) -> None:
        """record: pinned, until `give_back`."""
        self._records[key] = record

    def give_back(self, key: ExpertKey) -> None:
        del self._records[key]

    def num_bytes(self, key: ExpertKey) -> int:
        return self._num_bytes[key.layer]

    def begin_check(self, key: ExpertKey) -> RecordCheck:
        return _NO_CHECK

    def read(self, key: ExpertKey, start: int, into: Tensor) -> None:
        """into: a part of a slot. Returns when it is there."""
        self.copy(self._records[key][start : start + len(into)], into)

    def copy(self, piece: NDArray[np.uint8], into: Tensor) -> None:
        """Through the calling thread's pinned memory, where there is such a thing.

        Raises StoreError where the device reports an error: a thread must not end of it unheard.
        """
        try:
            self._copy(piece, into)
        except RuntimeError as error:
            raise StoreError(f"a copy to {self._device} has failed: {error}") from error

    def _copy(self, piece: NDArray[np.uint8], into: Tensor) -> None:
        if self._device.type != "cuda":
            np.copyto(into.numpy(), piece)
            return
        pinned, stream = self._of_thread()
        for start in range(0, len(piece), CHUNK_BYTES):
            part, target = piece[start : start + CHUNK_BYTES], into[start : start + CHUNK_BYTES]
            np.copyto(pinned.numpy()[: len(part)], part)
            with torch.cuda.stream(stream):
                target.copy_(pinned[: len(part)], non_blocking=True)
            stream.synchronize()

    def _of_thread(self) -> tuple[Tensor, torch.cuda.Stream]:
        found: tuple[Tensor, torch.cuda.Stream] | None = getattr(self._own, "found", None)
        if found is None:
            pinned = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
            found = self._own.found = pinned, torch.cuda.Stream(self._device)
        return found


def check_room(device: torch.device, num_bytes: int) -> None:
    """ConfigError where a CUDA device has less free memory than that."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if num_bytes > free:
        raise ConfigError(
            f"device_memory: {num_bytes} bytes for experts, and {free} of {total} are free on"
            f" {device}",
            field="device_memory_bytes",
            hint="lower --device-memory; weights of every token and kv need room there, too",
        )
