"""How many kv blocks there may be; without torch, for who only plans."""

from __future__ import annotations

from moeserve.config import EngineConfig
from moeserve.core import ConfigError

#: kv by default, at most
DEFAULT_BYTES = 1 << 30


def num_kv_blocks(
    config: EngineConfig, block_bytes: int, rest_bytes: int, context_tokens: int
) -> int:
    """As asked, else for full contexts, up to 1 GiB and to half of what a budget leaves beside
    `rest_bytes`, the weights of every token. Raises ConfigError for less than a block."""
    kv = config.kv
    if kv.num_blocks is not None:
        return kv.num_blocks
    if kv.kv_bytes is not None:
        if kv.kv_bytes < block_bytes:
            raise ConfigError(
                f"kv_bytes: {kv.kv_bytes} is below one block of {block_bytes} bytes",
                field="kv_bytes",
                hint="raise --kv-bytes or lower --block-tokens",
            )
        return kv.kv_bytes // block_bytes
    affordable = DEFAULT_BYTES
    if (budget_bytes := config.experts.host_memory_bytes) is not None:
        affordable = min(affordable, (budget_bytes - rest_bytes) // 2)
    per_sequence = -(-context_tokens // kv.block_tokens)
    return max(1, min(config.scheduler.max_running * per_sequence, affordable // block_bytes))
