"""What a block manager deals with: the table of a sequence, and the memory for blocks."""

from __future__ import annotations

from typing import Protocol

from moeserve.engine.prefix_index import PrefixNode


class BlockTable:
    """The blocks of one sequence.

    block_ids: held blocks in the order of positions; empty while the sequence waits.
    path: index nodes of the leading blocks. While holding, `path[i].block_id == block_ids[i]`;
    while waiting, the prefix that could be reused if the sequence were admitted now.
    variant: of the kv, which is shared with tables of the same variant only.
    """

    __slots__ = ("block_ids", "path", "variant")

    def __init__(self) -> None:
        self.block_ids: list[int] = []
        self.path: list[PrefixNode] = []
        self.variant = 0


class KvRoom(Protocol):
    """Has the memory for blocks."""

    @property
    def extent(self) -> int:
        """Blocks that may be used now."""
        ...

    def grow(self, needed: int, preferred: int) -> None:
        """Makes the extent larger, to `needed` blocks at least. With `preferred` of them no idle
        block would have to be evicted. Neither is more than the pool has."""
        ...


class AllBlocks:
    """A pool with memory for all of its blocks, for good."""

    def __init__(self, num_blocks: int) -> None:
        self.extent = num_blocks

    def grow(self, needed: int, preferred: int) -> None:
        """Nothing: there are no more blocks than these."""
