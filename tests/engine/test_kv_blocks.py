"""BlockManager against a model that knows prefixes, counts and an LRU list, but no block ids."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from fake_model import ChunkRoom
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moeserve.core import ConfigError
from moeserve.engine.block_table import BlockTable
from moeserve.engine.kv_blocks import BlockManager

Prefix = tuple[int, ...]


@dataclass
class User:
    """A sequence: its table, and what the model thinks it holds."""

    tokens: list[int]
    table: BlockTable = field(default_factory=BlockTable)
    computed: int = 0
    held: list[Prefix] = field(default_factory=list)
    private: int = 0  # blocks that are not indexed


@dataclass
class Model:
    free: int
    indexed: set[Prefix] = field(default_factory=set)
    idle: list[Prefix] = field(default_factory=list)  # oldest first

    def take(self) -> None:
        if self.free:
            self.free -= 1
        else:
            self.indexed.remove(self.idle.pop(0))

    def hold(self, prefix: Prefix) -> None:
        if prefix in self.idle:
            self.idle.remove(prefix)


class KvBlocksMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 14),
        block_tokens=st.integers(1, 3),
        reuse=st.sampled_from([1, 1, 0]),
        extent=st.integers(0, 14),
        chunk=st.integers(1, 4),
        keeps_idle=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        block_tokens: int,
        reuse: int,
        extent: int,
        chunk: int,
        keeps_idle: bool,
    ) -> None:
        self.size, self.reuse, self.limit = block_tokens, bool(reuse), num_blocks
        self.room = ChunkRoom(min(extent, num_blocks), num_blocks, chunk, keeps_idle)
        self.blocks = BlockManager(num_blocks, block_tokens, self.reuse, self.room)
        self.model = Model(free=self.blocks.extent)
        # What a slot contains: kv depends on every token before it, so the whole prefix.
        self.content: dict[tuple[int, int], Prefix] = {}
        self.active: list[User] = []
        self.waiting: list[User] = []

    def _held(self) -> int:
        """Blocks that are held, by counting holders."""
        shared = {prefix for user in self.active for prefix in user.held}
        return len(shared) + sum(user.private for user in self.active)

    def _take(self, count: int, extent: int) -> None:
        """What `extend` took, where the extent was so large before."""
        self.model.free += self.blocks.extent - extent
        for _ in range(count):
            self.model.take()

    def _blocks_for(self, num_tokens: int) -> int:
        return (num_tokens + self.size - 1) // self.size

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def arrive(self, tokens: list[int]) -> None:
        self.waiting.append(User(tokens))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), spare=st.integers(0, 2))
    def match(self, data: st.DataObject, spare: int) -> None:
        """Look up, compare with the model, and start if there is room."""
        user = data.draw(st.sampled_from(self.waiting))
        limit = max(len(user.tokens) - spare, 0)
        found = self.blocks.match(user.table, user.tokens, limit)
        path: list[Prefix] = []
        while self.reuse and (len(path) + 1) * self.size <= limit:
            prefix = tuple(user.tokens[: (len(path) + 1) * self.size])
            if prefix not in self.model.indexed:
                break
            path.append(prefix)
        assert found == len(path) * self.size
        idle = sum(prefix in self.model.idle for prefix in path)
        cost = self._blocks_for(len(user.tokens)) - len(path) + idle
        assert self.blocks.num_blocks_to_take(user.table, len(user.tokens)) == cost
        self._check_split(user, path)
        if cost > self.limit - self._held():
            return
        extent = self.blocks.extent
        self.blocks.claim(user.table)
        for prefix in path:
            self.model.hold(prefix)
        self._read(user, len(path) * self.size)
        assert self.blocks.extend(user.table, len(user.tokens))
        user.held, user.private = path, self._blocks_for(len(user.tokens)) - len(path)
        self._take(user.private, extent)
        user.computed = len(path) * self.size
        self.waiting.remove(user)
        self.active.append(user)

    def _check_split(self, user: User, path: list[Prefix]) -> None:
        """The division of blocks if `user` started, by counting holders one by one."""
        everyone = [*(u.held for u in self.active), path]
        holders = {p: sum(p in held for held in everyone) for held in everyone for p in held}
        private = [
            *(u.private for u in self.active),
            self._blocks_for(len(user.tokens)) - len(path),
        ]
        alone = [
            sum(holders[p] == 1 for p in held) + own
            for held, own in zip(everyone, private, strict=True)
        ]
        # The newcomer's idle blocks are counted as shared: nobody else can take them either.
        newcomer_idle = sum(p in self.model.idle for p in path)
        shared = sum(count > 1 for count in holders.values())
        tables = [u.table for u in self.active]
        got_shared, got = self.blocks.split_shared(tables)
        join = self.blocks.joining(user.table, len(user.tokens), tables)
        assert (join.holder is None) == (join.num_shared == 0)
        if join.holder is not None:
            got[join.holder] -= join.num_shared
        got_shared += join.num_shared
        assert got_shared + sum(got) + join.num_alone == shared + sum(alone)
        assert got == alone[:-1]
        assert join.num_alone in (alone[-1], alone[-1] - newcomer_idle)

    def _read(self, user: User, stop: int) -> None:
        for position in range(stop):
            block_id = user.table.block_ids[position // self.size]
            expected = tuple(user.tokens[: position + 1])
            assert self.content[block_id, position % self.size] == expected

    @precondition(lambda self: self.active)
    @rule(data=st.data(), num_tokens=st.integers(1, 6))
    def compute(self, data: st.DataObject, num_tokens: int) -> None:
        """Write the next tokens and publish them, as a step does."""
        user = data.draw(st.sampled_from(self.active))
        stop = min(user.computed + num_tokens, len(user.tokens))
        others = {b for u in self.active if u is not user for b in u.table.block_ids}
        for position in range(user.computed, stop):
            block_id = user.table.block_ids[position // self.size]
            assert block_id not in others, "a shared block is written"
            self.content[block_id, position % self.size] = tuple(user.tokens[: position + 1])
        user.computed = stop
        self.blocks.publish(user.table, user.tokens, stop)
        for count in range(len(user.held) + 1, stop // self.size + 1):
            if not self.reuse:
                break
            prefix = tuple(user.tokens[: count * self.size])
            if prefix in self.model.indexed:
                self.model.hold(prefix)
                self.model.free += 1
            self.model.indexed.add(prefix)
            user.held.append(prefix)
            user.private -= 1
        self._read(user, stop)

    @precondition(lambda self: any(u.computed == len(u.tokens) for u in self.active))
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        """One more token, as in decode."""
        ready = [u for u in self.active if u.computed == len(u.tokens)]
        user = data.draw(st.sampled_from(ready))
        missing = self._blocks_for(len(user.tokens) + 1) - len(user.table.block_ids)
        fits, extent = missing <= self.limit - self._held(), self.blocks.extent
        assert self.blocks.extend(user.table, len(user.tokens) + 1) == fits
        if fits:
            user.tokens.append(token)
            user.private += missing
            self._take(missing, extent)

    @precondition(lambda self: self.active)
    @rule(data=st.data(), again=st.booleans())
    def release(self, data: st.DataObject, again: bool) -> None:
        """End or preempt a sequence."""
        user = data.draw(st.sampled_from(self.active))
        self.active.remove(user)
        self.blocks.release(user.table)
        assert not user.table.block_ids
        self.model.free += user.private
        for prefix in reversed(user.held):
            if not any(prefix in other.held for other in self.active):
                self.model.idle.append(prefix)
        user.held, user.private, user.computed = [], 0, 0
        if again:
            self.waiting.append(user)

    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        """Less memory: idle blocks go, oldest first, and the others keep what they contain."""
        held = self._held()
        extent = data.draw(st.integers(held, self.blocks.extent))
        tables = [user.table for user in self.active]
        moves = self.blocks.shrink(extent, tables)
        self.room.extent = extent
        assert all(source >= extent > target for source, target in moves)
        assert len({target for _, target in moves}) == len(moves)
        for source, target in moves:
            for offset in range(self.size):
                if (source, offset) in self.content:
                    self.content[target, offset] = self.content[source, offset]
        for key in [key for key in self.content if key[0] >= extent]:
            del self.content[key]  # as the system takes its pages
        while held + len(self.model.idle) > extent:
            self.model.indexed.remove(self.model.idle.pop(0))
        self.model.free = extent - held - len(self.model.idle)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "blocks"):
            return
        self.blocks.check_integrity(user.table for user in self.active)
        assert self.blocks.num_available == self.limit - self._held()
        assert self.blocks.extent == self._held() + self.model.free + len(self.model.idle)
        assert self.blocks.num_idle == len(self.model.idle)
        assert self.blocks.num_indexed == len(self.model.indexed)
        for user in self.active:
            self._read(user, user.computed)

    def teardown(self) -> None:
        for user in list(getattr(self, "active", [])):
            self.blocks.release(user.table)
        if hasattr(self, "blocks"):
            self.blocks.check_integrity([])
            assert self.blocks.num_held == 0, "a block leaked"


KvBlocksMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestKvBlocks = KvBlocksMachine.TestCase


def _fill(blocks: BlockManager, tokens: list[int]) -> BlockTable:
    table = BlockTable()
    blocks.match(table, tokens, len(tokens) - 1)
    blocks.claim(table)
    assert blocks.extend(table, len(tokens))
    blocks.publish(table, tokens, len(tokens))
    return table


def test_equal_prefixes_computed_side_by_side_end_in_one_block() -> None:
    blocks = BlockManager(8, 2, prefix_reuse=True)
    first, second = BlockTable(), BlockTable()
    for table in (first, second):
        blocks.match(table, [7, 7, 7], 2)
        blocks.claim(table)
        blocks.extend(table, 3)
    assert blocks.num_held == 4
    for table in (first, second):
        blocks.publish(table, [7, 7, 7], 3)
    assert first.block_ids[0] == second.block_ids[0]
    assert blocks.num_held == 3
    blocks.check_integrity([first, second])


def test_eviction_takes_the_oldest_leaf_first() -> None:
    blocks = BlockManager(4, 1, prefix_reuse=True)
    blocks.release(_fill(blocks, [1, 2]))
    blocks.release(_fill(blocks, [3, 4]))
    _fill(blocks, [5])  # nothing is free: evicts the leaf 1-2
    left = BlockTable()
    assert blocks.match(left, [1, 2], 2) == 1
    left = BlockTable()
    assert blocks.match(left, [3, 4], 2) == 2


def test_same_block_tokens_after_another_prefix_are_not_reused() -> None:
    blocks = BlockManager(8, 2, prefix_reuse=True)
    blocks.release(_fill(blocks, [1, 1, 9, 9]))
    assert blocks.match(BlockTable(), [2, 2, 9, 9], 4) == 0
    assert blocks.match(BlockTable(), [9, 9], 2) == 0


def test_a_waiting_table_notices_eviction_and_growth() -> None:
    blocks = BlockManager(3, 1, prefix_reuse=True)
    blocks.release(_fill(blocks, [1, 2, 3]))
    waiting = BlockTable()
    assert blocks.match(waiting, [1, 2, 3], 3) == 3
    other = _fill(blocks, [8, 8])
    assert blocks.match(waiting, [1, 2, 3], 3) == 1
    blocks.release(other)
    blocks.release(_fill(blocks, [1, 2]))
    assert blocks.match(waiting, [1, 2, 3], 3) == 2


@pytest.mark.parametrize(("num_blocks", "block_tokens"), [(0, 1), (1, 0)])
def test_empty_pools_are_refused(num_blocks: int, block_tokens: int) -> None:
    with pytest.raises(ConfigError, match="below the minimum 1"):
        BlockManager(num_blocks, block_tokens, prefix_reuse=True)
