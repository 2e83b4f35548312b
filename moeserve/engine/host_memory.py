"""One budget of the host's memory for weights of every token, kv and experts.

Experts have what the others leave. Kv takes memory for blocks as sequences need them, a chunk at a
time, and the expert cache gives up as many slots beforehand; what sequences have left goes back to
it between two steps. So a server under few requests has nearly all of its memory for experts, and
under many nearly all that kv may ever take.

Why memory is not divided at the start: a pool for the worst case stands empty most of the time, and
one slot less is a miss more in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from moeserve.core import ConfigError
from moeserve.stats import MemoryStats

#: part of the memory of kv and experts that blocks of past requests may keep while experts are
#: missed: a prefix that is used again saves a prefill, a slot a read in every so many steps, and
#: nobody can say beforehand which will come
IDLE_SHARE = 1 / 8


class ExpertMemory(Protocol):
    """The host tier over the disk; an ExpertRuntime."""

    @property
    def host_slot_bytes(self) -> int | None:
        """None: there is no such tier."""
        ...

    @property
    def num_misses(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    def reserve_host_memory(self, num_bytes: int) -> None: ...

    def resize_host_memory(self, num_bytes: int) -> None: ...

    def settle_host_memory(self) -> None: ...


@dataclass(frozen=True)
class KvSizes:
    """num_blocks: the most there may be. page_blocks: as many as make up whole pages."""

    num_blocks: int
    block_bytes: int
    page_blocks: int


class HostMemory:
    """A KvRoom that shares with experts.

    Until it has a budget, kv has memory for all of its blocks, and experts what they were given.
    With one, at least the weights, all kv and `min_slots` experts have room in it, so blocks can
    always be had.
    """

    def __init__(
        self,
        experts: ExpertMemory,
        weights_bytes: int,
        sizes: KvSizes,
        min_slots: int,
        shares: bool = False,
        kv_elsewhere: bool = False,
    ) -> None:
        """shares: a budget will be set before anything runs; kv begins with nothing. kv_elsewhere:
        it is on a device, all of it from the start, and costs no memory of the host's."""
        self.extent = 0 if shares and not kv_elsewhere else sizes.num_blocks
        self._block_bytes = 0 if kv_elsewhere else sizes.block_bytes
        self.budget_bytes: int | None = None
        self._experts = experts
        self._weights_bytes = weights_bytes
        self.sizes = sizes
        self._min_slots = min_slots
        self._slot_bytes = experts.host_slot_bytes or 0
        # About one slot: what changes hands is no less, and moving less would gain nothing.
        pages = sizes.page_blocks
        self._chunk = max(1, -(-self._slot_bytes // (pages * sizes.block_bytes))) * pages
        self._misses_seen = 0
        self._num_grown = self._num_shrunk = 0

    @property
    def limit_bytes(self) -> int:
        """Of all blocks that there may ever be, in host memory."""
        return self.sizes.num_blocks * self._block_bytes

    def set_budget(self, budget_bytes: int) -> None:
        """Between two steps; `shrink` comes next, to what kv should have of it, if only to what it
        has. Raises ConfigError where it is too small or experts need none, and where the system
        has no such memory: nothing was changed then, and later nothing can be lacking."""
        if not self._slot_bytes:
            raise ConfigError(
                "host_memory: all experts are resident, there is nothing to be resized",
                field="host_memory_bytes",
                hint="serve a model written by `moeserve pack` with --host-memory",
            )
        slots_bytes = self._min_slots * self._slot_bytes
        least = self._weights_bytes + self.limit_bytes + slots_bytes
        if budget_bytes < least:
            raise ConfigError(
                f"host_memory: {budget_bytes} bytes; the weights of every token take"
                f" {self._weights_bytes}, kv up to {self.limit_bytes}, and {self._min_slots}"
                f" experts {slots_bytes}: at least {least}",
                field="host_memory_bytes",
                hint="raise --host-memory, lower --kv-bytes or --min-host-slots, or pack the model"
                " with fewer bits",
            )
        try:
            self._experts.reserve_host_memory(budget_bytes - self._weights_bytes)
        except MemoryError as error:
            raise ConfigError(
                f"host_memory: the system has no {budget_bytes} bytes: {error}",
                field="host_memory_bytes",
            ) from error
        self.budget_bytes = budget_bytes

    def grow(self, needed: int, preferred: int) -> None:
        """See KvRoom. Waits until experts have left the memory."""
        if not self._shares_with_kv:
            return
        num_idle = preferred - needed
        if self._is_short(preferred):
            num_idle = min(num_idle, self._idle_blocks())
        extent = self._whole_chunks(needed + num_idle)
        if extent > self.extent:
            self._num_grown += 1
            self._resize(extent)
            self._experts.settle_host_memory()

    def fitting_extent(self, num_held: int, num_idle: int) -> int:
        """The extent that kv should have now. One chunk more than is used stays, so that a sequence
        that ends and one that begins do not move memory to and fro."""
        if not self._shares_with_kv or not self._is_short(self.extent):
            return self.extent
        misses = self._experts.num_misses
        if misses != self._misses_seen:
            num_idle = min(num_idle, self._idle_blocks())
        self._misses_seen = misses
        return min(self.extent, self._whole_chunks(num_held + num_idle) + self._chunk)

    def shrink(self, extent: int) -> None:
        """The memory of blocks beyond the extent was given back: experts get what there is."""
        self._num_shrunk += extent < self.extent
        self._resize(extent)

    def stats(self) -> MemoryStats | None:
        """None where nothing is shared."""
        if self.budget_bytes is None:
            return None
        kv_bytes = self.extent * self._block_bytes
        return MemoryStats(
            budget_bytes=self.budget_bytes,
            weights_bytes=self._weights_bytes,
            kv_bytes=kv_bytes,
            kv_limit_bytes=self.limit_bytes,
            experts_bytes=self._num_slots(self.extent) * self._slot_bytes,
            num_kv_grown=self._num_grown,
            num_kv_shrunk=self._num_shrunk,
        )

    # Inside

    def _resize(self, extent: int) -> None:
        self.extent = extent
        self._experts.resize_host_memory(self._shared_bytes() - extent * self._block_bytes)

    @property
    def _shares_with_kv(self) -> bool:
        """Whether what kv takes is taken from experts."""
        return self.budget_bytes is not None and self._block_bytes > 0

    def _shared_bytes(self) -> int:
        """For kv and experts."""
        assert self.budget_bytes is not None
        return self.budget_bytes - self._weights_bytes

    def _idle_blocks(self) -> int:
        return int(IDLE_SHARE * self._shared_bytes()) // self.sizes.block_bytes

    def _num_slots(self, extent: int) -> int:
        left = self._shared_bytes() - extent * self._block_bytes
        return min(left // self._slot_bytes, self._experts.num_experts)

    def _is_short(self, extent: int) -> bool:
        """Whether there is no room for all experts beside so many blocks."""
        return self._num_slots(extent) < self._experts.num_experts

    def _whole_chunks(self, num_blocks: int) -> int:
        chunks = -(-num_blocks // self._chunk)
        return min(chunks * self._chunk, self.sizes.num_blocks)
