"""What caches and transfers count, in the form in which it leaves the engine."""

from __future__ import annotations

from dataclasses import fields

from moeserve.cache.counters import CacheCounters
from moeserve.cache.expert_cache import ExpertCache
from moeserve.cache.numbering import ExpertNumbers
from moeserve.cache.transfer_stats import TransferStats
from moeserve.cache.types import Tier
from moeserve.stats import CacheStats, LinkStats


def cache_stats(cache: ExpertCache, slot_bytes: int) -> CacheStats:
    counts = {f.name: getattr(cache.counters, f.name).tolist() for f in fields(CacheCounters)}
    return CacheStats(
        tier=cache.tier.value,
        num_slots=cache.num_slots,
        num_used=cache.num_slots + cache.num_owed - cache.num_free,
        num_owed=cache.num_owed,
        slot_bytes=slot_bytes,
        **counts,
    )


def link_stats(tier: Tier, numbers: ExpertNumbers, stats: TransferStats) -> LinkStats:
    """tier: the one that is written. stats: of one moment."""
    each = [stats.layers[layer] for layer in numbers.layers]
    return LinkStats(
        tier=tier.value,
        demand_bytes=[of_layer.demand_bytes for of_layer in each],
        prefetch_bytes=[of_layer.prefetch_bytes for of_layer in each],
        busy_s=[of_layer.busy_s for of_layer in each],
        stall_s=[of_layer.stall_s for of_layer in each],
        num_demands=stats.num_demands,
        num_prefetches=stats.num_prefetches,
        num_promoted=stats.num_promoted,
        num_failed=stats.num_failed,
        num_retries=stats.num_retries,
    )
