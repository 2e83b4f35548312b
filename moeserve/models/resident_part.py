"""A packed model of which only the part that every token needs is read: routed experts stay on
disk, to be fetched as they are wanted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from moeserve.cache.tiers.disk_store import DiskRecord
from moeserve.core import ExpertKey
from moeserve.models.packed_model import PackedModel
from moeserve.models.stores import HeapMemory, Store


class ResidentPart:
    """Memory for `PackedTargets`: copies of the packed weights, and only a mapping of the experts.

    Copies, because a mapped page is the first thing that the system takes back under a memory
    limit, and would then be read again in every step. The experts' mapping is never touched.
    """

    is_filled = True

    def __init__(self, packed: PackedModel) -> None:
        """Raises ModelError for a directory whose experts cannot be read one by one."""
        self._packed = packed
        self.num_bytes = 0  # of the copies
        self.records: dict[ExpertKey, DiskRecord] = {}
        for name in filter(is_routed, packed.manifest.weights):
            layer = int(name.split(".")[1])
            for expert, record in enumerate(packed.on_disk(name)):
                self.records[ExpertKey(layer, expert)] = record

    def reserve(self, stores: Sequence[Store]) -> dict[str, Tensor]:
        """Raises ModelError as `PackedModel` does, and where there is no memory."""
        mapped = self._packed.reserve(stores)
        copied = [store for store in stores if not is_routed(store.name)]
        rooms = HeapMemory().reserve(copied)
        for store in copied:
            rooms[store.name].copy_(mapped.pop(store.name))
            self.num_bytes += rooms[store.name].nbytes
            self._packed.release(store.name)
        self._packed.leave_page_cache()
        return mapped | rooms


def is_routed(name: str) -> bool:
    """Whether a store of that name holds experts that a router chooses among."""
    return re.fullmatch(r"layers\.\d+\.experts", name) is not None
