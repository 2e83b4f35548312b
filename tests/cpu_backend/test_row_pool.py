"""Memory of rows that live for moments: nobody's while they live, the next one's when they are
gone."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_runtime import POOLED_BYTES, NativeRuntime


class Pool(RuleBasedStateMachine):
    """Blocks are filled with a number of their own when they are taken."""

    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.pool = _native.RowPool()
        self.alive: dict[int, np.ndarray] = {}
        self.most_alive = self.number = 0

    @rule(target=blocks, num_bytes=st.integers(1, 1 << 16))
    def take(self, num_bytes: int) -> int:
        block = self.pool.take(num_bytes)
        assert block.shape == (num_bytes,)
        self.number += 1
        block.fill(self.number % 251)
        self.alive[self.number] = block
        self.most_alive = max(self.most_alive, len(self.alive))
        return self.number

    @rule(number=consumes(blocks))
    def drop(self, number: int) -> None:
        free = self.pool.num_free
        del self.alive[number]
        assert self.pool.num_free == free + 1

    @invariant()
    def nobody_writes_to_anothers(self) -> None:
        for number, block in self.alive.items():
            assert (block == number % 251).all()

    @invariant()
    def there_are_no_more_than_were_in_use(self) -> None:
        assert self.pool.num_free + len(self.alive) <= self.most_alive


TestPool = Pool.TestCase


def test_large_rows_take_memory_that_others_have_had() -> None:
    runtime = NativeRuntime(num_threads=1)
    width = POOLED_BYTES // 2 // 64
    first = runtime.empty_rows(64, width, torch.bfloat16)
    assert first.shape == (64, width)
    assert first.dtype == torch.bfloat16
    beside = runtime.empty_rows(64, width, torch.bfloat16)
    place = first.data_ptr()
    assert beside.data_ptr() != place
    view = first[3:5]
    del first
    assert runtime.empty_rows(64, width, torch.bfloat16).data_ptr() != place, "a view is in use"
    del view
    assert runtime.empty_rows(32, width, torch.float32).data_ptr() == place


def test_tensors_outlive_the_runtime() -> None:
    runtime = NativeRuntime(num_threads=1)
    rows = runtime.empty_rows(1, POOLED_BYTES, torch.float32).fill_(3.0)
    del runtime
    gc.collect()
    assert (rows == 3.0).all()


def test_small_and_empty_rows() -> None:
    runtime = NativeRuntime(num_threads=1)
    assert runtime.empty_rows(0, 4096, torch.float32).shape == (0, 4096)
    assert runtime.empty_rows(2, 8, torch.float16).shape == (2, 8)


def test_of_no_bytes_there_is_no_block() -> None:
    with pytest.raises(ValueError, match="num_bytes: must be 1 or more"):
        _native.RowPool().take(0)
