"""How many kv blocks there may be, and what one takes."""

from __future__ import annotations

from moeserve.config import EngineConfig
from moeserve.core import ConfigError
from moeserve.engine.host_memory import KvSizes
from moeserve.models.kv_pool import KvPool
from moeserve.models.registry import LoadedModel

#: kv by default, at most
DEFAULT_BYTES = 1 << 30


def kv_sizes(config: EngineConfig, loaded: LoadedModel) -> KvSizes:
    """As asked, else for full contexts, up to 1 GiB and to half of what a budget leaves beside the
    weights of every token. Raises ConfigError for less than a block."""
    kv, spec, dtype = config.kv, loaded.spec, loaded.dtype
    block_bytes = KvPool.bytes_per_block(spec, kv.block_tokens, dtype)
    if kv.num_blocks is not None:
        num_blocks = kv.num_blocks
    elif kv.kv_bytes is not None:
        num_blocks = kv.kv_bytes // block_bytes
    else:
        affordable = DEFAULT_BYTES
        if (budget_bytes := config.experts.host_memory_bytes) is not None:
            affordable = min(affordable, (budget_bytes - loaded.resident_bytes) // 2)
        per_sequence = -(-loaded.context_tokens // kv.block_tokens)
        wanted = config.scheduler.max_running * per_sequence
        num_blocks = max(1, min(wanted, affordable // block_bytes))
    if num_blocks < 1:
        raise ConfigError(
            f"kv_bytes: {kv.kv_bytes} is below one block of {block_bytes} bytes",
            field="kv_bytes",
            hint="raise --kv-bytes or lower --block-tokens",
        )
    return KvSizes(num_blocks, block_bytes, KvPool.page_blocks(spec, kv.block_tokens, dtype))
