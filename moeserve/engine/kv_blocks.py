"""Paged kv: who holds which block, and which blocks of past requests can be used again.

Bookkeeping only; the bytes live in the models room. Blocks are in one of three states:

- free: nobody holds it, its content means nothing;
- held: reference count of one or more;
- idle: indexed by its prefix, held by nobody; counted as available and evicted oldest first.

All of them are below the extent; blocks beyond it have no memory now. Who has the memory, a KvRoom,
makes the extent larger when blocks are wanted, and may have it made smaller between two steps
(`shrink`). Free blocks are given out lowest first, so that little has to move then.

Two rules make everything else simple:

1. A full, computed block is indexed at once (`publish`), and a block whose content is already
   indexed is swapped for the indexed one. So equal prefixes of running requests share their blocks
   from then on, and whoever holds a node's block holds the blocks of all its ancestors.
2. Tables are released from the tail to the head. With rule 1 an ancestor always becomes idle after
   its descendants, so the oldest idle block is always a leaf: LRU order *is* leaf-first order.

Only blocks that are full are ever shared, and full blocks are never written again.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moeserve.core import ConfigError
from moeserve.engine.block_table import AllBlocks, BlockTable, KvRoom
from moeserve.engine.prefix_index import PrefixIndex, PrefixNode


class Joining(NamedTuple):
    """How a waiting table would change who holds what, were it claimed and extended.

    num_alone: blocks that it alone would hold.
    num_shared: blocks that one table alone holds now and that it would be the second to hold.
    holder: index of that table; None where there are no such blocks.
    """

    num_alone: int
    num_shared: int
    holder: int | None


class BlockManager:
    """A pool of `num_blocks` blocks of `block_tokens` tokens with reference counts.

    num_blocks: with the largest extent. A request is admitted by this number: whatever is lacking
    below it can be had.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, prefix_reuse: bool, room: KvRoom | None = None
    ) -> None:
        """room: None: all blocks have memory."""
        for name, value in (("num_blocks", num_blocks), ("block_tokens", block_tokens)):
            if value < 1:
                raise ConfigError(f"{name}: {value} is below the minimum 1", field=name)
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.prefix_reuse = prefix_reuse
        self._index = PrefixIndex(block_tokens)
        self._room: KvRoom = AllBlocks(num_blocks) if room is None else room
        self._extent = self._room.extent
        self._references = [0] * num_blocks
        self._free = list(range(self._extent))  # a heap
        self._idle: OrderedDict[int, PrefixNode] = OrderedDict()  # oldest first

    # -- what there is ----------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now: free and idle ones, and those beyond the extent."""
        return self.num_blocks - self.num_held

    @property
    def num_held(self) -> int:
        return self._extent - len(self._free) - len(self._idle)

    @property
    def extent(self) -> int:
        """Blocks that may be used now; their ids are below it."""
        return self._extent

    @property
    def num_idle(self) -> int:
        """Indexed blocks that nobody holds: the prefix cache proper."""
        return len(self._idle)

    @property
    def num_indexed(self) -> int:
        return len(self._index)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def num_blocks_to_take(self, table: BlockTable, num_tokens: int) -> int:
        """Available blocks that claiming and extending a waiting table to `num_tokens` would use.

        Prefix blocks that somebody holds already cost nothing; idle ones cost themselves.
        """
        fresh = self.blocks_for(num_tokens) - len(table.path)
        return fresh + len(table.path) - self._first_with(table.path, 0)

    def split_shared(self, holders: Sequence[BlockTable]) -> tuple[int, list[int]]:
        """How many of the held blocks two or more tables share, and how many each holds alone.

        holders: all tables that hold blocks.
        """
        alone = [len(table.block_ids) - self._first_with(table.path, 1) for table in holders]
        return self.num_held - sum(alone), alone

    def joining(
        self, newcomer: BlockTable, num_tokens: int, holders: Sequence[BlockTable]
    ) -> Joining:
        """What claiming `newcomer` and extending it to `num_tokens` would change for `holders`."""
        first, stop = self._first_with(newcomer.path, 1), self._first_with(newcomer.path, 0)
        holder = None
        if first < stop:
            # Who holds the last of these alone holds them all, because it holds its ancestors.
            node = newcomer.path[first]
            holder = next(
                index
                for index, table in enumerate(holders)
                if first < len(table.path) and table.path[first] is node
            )
        return Joining(self.blocks_for(num_tokens) - stop, stop - first, holder)

    def _first_with(self, path: list[PrefixNode], references: int) -> int:
        """Index of the first node with at most so many references.

        A holder of a node holds its ancestors (rule 1): counts never rise along a path, so the
        place can be found by bisection. Mostly all or none of a path is shared: look there first.
        """
        counts = self._references
        if not path or counts[path[0].block_id] <= references:
            return 0
        if counts[path[-1].block_id] > references:
            return len(path)
        return bisect_left(path, True, key=lambda node: counts[node.block_id] <= references)

    # -- life of a table --------------------------------------------------------------------------

    def match(self, table: BlockTable, token_ids: Sequence[int], max_tokens: int) -> int:
        """Looks up the longest reusable prefix of a waiting table; takes nothing.

        Returns its length in tokens: whole blocks, at most `max_tokens`.
        """
        assert not table.block_ids
        if self.prefix_reuse:
            most_blocks = max_tokens // self.block_tokens
            self._index.match(token_ids, most_blocks, table.path, table.variant)
        return len(table.path) * self.block_tokens

    def claim(self, table: BlockTable) -> None:
        """Takes a reference on every block that `match` found."""
        assert not table.block_ids
        for node in table.path:
            self._hold(node)
            table.block_ids.append(node.block_id)

    def extend(self, table: BlockTable, num_tokens: int) -> bool:
        """Adds blocks until `num_tokens` fit. False, and nothing changed, when too few are left."""
        missing = self.blocks_for(num_tokens) - len(table.block_ids)
        if missing > self.num_available:
            return False
        if missing > len(self._free):
            self._grow(self.num_held + missing)
        for _ in range(missing):
            table.block_ids.append(self._take())
        return True

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Indexes the blocks that the first `num_computed` tokens fill.

        Where an equal prefix is indexed already, the table gets that block and gives its own back:
        `table.block_ids` may change, so a step must not keep block ids beyond its commit.
        """
        if not self.prefix_reuse:
            return
        size = self.block_tokens
        for position in range(len(table.path), num_computed // size):
            tokens = tuple(token_ids[position * size : (position + 1) * size])
            parent = table.path[-1] if table.path else self._index.root(table.variant)
            own = table.block_ids[position]
            node = self._index.insert(parent, tokens, own)
            if node.block_id != own:
                self._hold(node)
                table.block_ids[position] = node.block_id
                self._references[own] -= 1
                assert self._references[own] == 0
                heapq.heappush(self._free, own)
            table.path.append(node)

    def release(self, table: BlockTable) -> None:
        """Gives all blocks back; indexed ones stay reusable until evicted, `path` knows them."""
        references, path = self._references, table.path
        for position in range(len(table.block_ids) - 1, -1, -1):
            block_id = table.block_ids[position]
            references[block_id] -= 1
            if references[block_id] > 0:
                continue
            if position < len(path):
                self._idle[block_id] = path[position]
            else:
                heapq.heappush(self._free, block_id)
        table.block_ids.clear()

    def shrink(self, extent: int, tables: Iterable[BlockTable]) -> list[tuple[int, int]]:
        """Leaves only blocks below `extent` in use, which must not be fewer than are held.

        tables: all that hold blocks. Idle blocks that do not fit are evicted, oldest first, and
        what lies beyond moves below. Returns the moves (from, to), which the caller makes before
        anything is read. Not between `schedule` and `commit`: block ids change.
        """
        assert self.num_held <= extent <= self._extent
        while self.num_held + len(self._idle) > extent:
            heapq.heappush(self._free, self._evict())
        free = set(self._free)
        left = sorted(block_id for block_id in free if block_id < extent)
        moving = [block_id for block_id in range(extent, self._extent) if block_id not in free]
        places = dict(zip(moving, left, strict=False))
        self._free = left[len(moving) :]  # sorted, and so a heap
        self._extent = extent
        if places:
            self._rename(places, tables)
        return list(places.items())

    # -- inside -----------------------------------------------------------------------------------

    def _hold(self, node: PrefixNode) -> None:
        if self._references[node.block_id] == 0:
            del self._idle[node.block_id]
        self._references[node.block_id] += 1

    def _grow(self, needed: int) -> None:
        self._room.grow(needed, min(needed + len(self._idle), self.num_blocks))
        grown = range(self._extent, self._room.extent)
        self._extent = self._room.extent
        assert needed <= self._extent <= self.num_blocks
        for block_id in grown:
            heapq.heappush(self._free, block_id)

    def _take(self) -> int:
        """A block to write: a free one, else the longest idle leaf."""
        block_id = heapq.heappop(self._free) if self._free else self._evict()
        self._references[block_id] = 1
        return block_id

    def _evict(self) -> int:
        """The longest idle leaf's block, which is in no state now."""
        block_id, node = self._idle.popitem(last=False)
        self._index.remove(node)
        return block_id

    def _rename(self, places: dict[int, int], tables: Iterable[BlockTable]) -> None:
        for table in tables:
            table.block_ids[:] = [places.get(b, b) for b in table.block_ids]
        for node in self._index.nodes():
            node.block_id = places.get(node.block_id, node.block_id)
        self._idle = OrderedDict((node.block_id, node) for node in self._idle.values())
        for source, target in places.items():
            self._references[target] = self._references[source]
            self._references[source] = 0

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Asserts every rule above; `tables` are all tables that hold blocks."""
        self._index.check_integrity()
        held: Counter[int] = Counter()
        for table in tables:
            held.update(table.block_ids)
            assert len(set(table.block_ids)) == len(table.block_ids)
            assert len(table.path) <= len(table.block_ids)
            for node, block_id in zip(table.path, table.block_ids, strict=False):
                assert node.alive
                assert node.block_id == block_id
            for block_id in table.block_ids[len(table.path) :]:
                assert held[block_id] == 1, f"block {block_id} is shared but not indexed"
        assert [held[b] for b in range(self.num_blocks)] == self._references
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & idle
        assert not (free | idle) & set(held)
        assert len(free) + len(idle) + len(held) == self._extent, "a block is lost"
        assert max((*free, *idle, *held), default=-1) < self._extent, "a block without memory"
        assert self._extent == self._room.extent
        age = {block_id: age for age, block_id in enumerate(self._idle)}
        for node in self._index.nodes():
            assert node.block_id not in free, "an indexed block is free"
            assert (node.block_id in idle) == (self._references[node.block_id] == 0)
            parent = node.parent
            if parent is None or parent.block_id < 0:
                continue
            assert self._references[parent.block_id] >= self._references[node.block_id]
            if parent.block_id in age:
                assert age[node.block_id] < age[parent.block_id], "a parent would go first"
        for block_id, node in self._idle.items():
            assert node.alive
            assert node.block_id == block_id
