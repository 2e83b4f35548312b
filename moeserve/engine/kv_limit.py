"""How many kv blocks there may be; without torch, for who only plans."""

from __future__ import annotations

from moeserve.config import EngineConfig
from moeserve.core import ConfigError

#: kv by default, at most
DEFAULT_BYTES = 1 << 30


def num_kv_blocks(
    config: EngineConfig,
    block_bytes: int,
    rest_bytes: int,
    slot_bytes: int,
    context_tokens: int,
    in_budget: bool = True,
) -> int:
    """As asked, else for full contexts, up to 1 GiB, to half of what a budget leaves beside
    `rest_bytes`, the weights of every token, and to what the least number of experts, of
    `slot_bytes` each, leaves of that. in_budget: kv is in the host's memory. Raises ConfigError for
    less than a block."""
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
    if in_budget and (budget_bytes := config.experts.host_memory_bytes) is not None:
        shared_bytes = budget_bytes - rest_bytes
        least_bytes = config.experts.min_host_slots * slot_bytes
        affordable = min(affordable, shared_bytes // 2, shared_bytes - least_bytes)
    per_sequence = -(-context_tokens // kv.block_tokens)
    return max(1, min(config.scheduler.max_running * per_sequence, affordable // block_bytes))
