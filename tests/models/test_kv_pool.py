"""The kv pool's memory: blocks that move, and pages that go back to the system."""

from __future__ import annotations

import mmap
import random

import pytest
import torch
from support.randomness import fresh_seed
from transformers import Qwen3MoeConfig

from moeserve.models import qwen3_moe
from moeserve.models.kv_pool import KvPool
from moeserve.models.spec import ModelSpec


def make_spec(kv_heads: int, head_dim: int) -> ModelSpec:
    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2,
        vocab_size=64, num_hidden_layers=3, num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=64,
    )  # fmt: skip
    return qwen3_moe.FAMILY.spec(config.to_dict(), "config.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_move_and_pages_go_back(dtype: torch.dtype) -> None:
    rng = random.Random(fresh_seed())
    torch.manual_seed(rng.randrange(1 << 30))
    spec = make_spec(rng.randint(1, 3), 8 * rng.randint(1, 5))
    block_tokens = rng.randint(1, 20)
    unit = KvPool.page_blocks(spec, block_tokens, dtype)
    block_bytes = KvPool.bytes_per_block(spec, block_tokens, dtype)
    assert unit * block_bytes // len(spec.layers) % mmap.PAGESIZE == 0
    assert unit == 1 or (unit - 1) * block_bytes // len(spec.layers) % mmap.PAGESIZE
    num_blocks = 3 * unit + rng.randint(0, unit)
    pool = KvPool(spec, num_blocks, block_tokens, dtype, torch.device("cpu"), shared=True)
    for layer in pool.layers:
        assert not layer.entries.any()
        layer.entries[: pool.null_slot] = torch.randn_like(layer.entries[: pool.null_slot])
    before = [layer.entries.clone() for layer in pool.layers]
    start = unit * rng.randint(1, 2)
    count = rng.randint(0, min(start, num_blocks - start))
    targets = rng.sample(range(start), count)
    moves = list(zip(rng.sample(range(start, num_blocks), count), targets, strict=True))
    pool.move(moves)
    pool.give_back(start, num_blocks)
    for layer, old in zip(pool.layers, before, strict=True):
        blocks = layer.entries[: pool.null_slot].view(num_blocks, block_tokens, -1)
        old_blocks = old[: pool.null_slot].view(num_blocks, block_tokens, -1)
        for source, target in moves:
            assert torch.equal(blocks[target], old_blocks[source])
        for block in set(range(start)) - set(targets):
            assert torch.equal(blocks[block], old_blocks[block])
        assert not layer.entries[start * block_tokens :].any(), "the null slot is zero, too"
        layer.entries[: pool.null_slot] = 1  # may be written again
