"""The kv pool of a loaded model: how many blocks, and what one takes."""

from __future__ import annotations

from moeserve.config import EngineConfig
from moeserve.engine.host_memory import KvSizes
from moeserve.engine.kv_limit import num_kv_blocks
from moeserve.models.kv_pool import KvPool
from moeserve.models.registry import LoadedModel


def kv_sizes(config: EngineConfig, loaded: LoadedModel) -> KvSizes:
    """Raises ConfigError for less than a block."""
    block_tokens, spec, dtype = config.kv.block_tokens, loaded.spec, loaded.dtype
    block_bytes = KvPool.bytes_per_block(spec, block_tokens, dtype)
    slot_bytes = loaded.runtime.host_slot_bytes or 0
    num_blocks = num_kv_blocks(
        config,
        block_bytes,
        loaded.resident_bytes,
        slot_bytes,
        loaded.context_tokens,
        in_budget=not loaded.kv_elsewhere,
    )
    return KvSizes(num_blocks, block_bytes, KvPool.page_blocks(spec, block_tokens, dtype))
