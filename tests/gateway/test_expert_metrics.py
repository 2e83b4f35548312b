"""Experts in /metrics, read by Prometheus' own parser."""

from __future__ import annotations

import random
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from support.randomness import fresh_seed

from moeserve.core import EngineStats
from moeserve.gateway.metrics import Metrics
from moeserve.messages import EngineStatus
from moeserve.stats import (
    CacheStats,
    ExpertStats,
    LinkStats,
    MemoryStats,
    PageStats,
    PoolStats,
    WorkerStats,
)

LAYERS = [1, 2, 5]


@dataclass(frozen=True)
class Series:
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    def __call__(self, name: str, **labels: object) -> float:
        return self.values[(name, tuple(sorted((k, str(v)) for k, v in labels.items())))]


def scrape(
    experts: ExpertStats, memory: MemoryStats | None = None, pages: PageStats | None = None
) -> Series:
    stats = EngineStats(kv_bytes=77, experts=experts, memory=memory, pages=pages)
    status = EngineStatus(epoch="e", stage="ready", stats=stats)
    text = Metrics(lambda: status).text().decode()
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return Series(found)


def random_cache(rng: random.Random, tier: str) -> CacheStats:
    def counts() -> list[int]:
        return [rng.randrange(10**6) for _ in LAYERS]

    return CacheStats(
        tier=tier,
        num_slots=rng.randrange(100),
        num_used=rng.randrange(100),
        num_owed=0,
        slot_bytes=rng.randrange(10**9),
        hits=counts(),
        late=counts(),
        misses=counts(),
        evictions=counts(),
        prefetches_begun=counts(),
        prefetches_useful=counts(),
        prefetches_wasted=counts(),
    )


def random_link(rng: random.Random, tier: str) -> LinkStats:
    return LinkStats(
        tier=tier,
        demand_bytes=[rng.randrange(10**12) for _ in LAYERS],
        prefetch_bytes=[rng.randrange(10**12) for _ in LAYERS],
        busy_s=[rng.random() for _ in LAYERS],
        stall_s=[rng.random() for _ in LAYERS],
        num_demands=rng.randrange(1000),
        num_prefetches=rng.randrange(1000),
        num_promoted=rng.randrange(1000),
        num_failed=rng.randrange(1000),
        num_retries=rng.randrange(1000),
    )


def test_every_layer_and_tier() -> None:
    rng = random.Random(fresh_seed())
    tiers = ("device", "host")
    experts = ExpertStats(
        layers=LAYERS,
        num_experts=[8, 8, 4],
        cpu_busy_s=[rng.random() for _ in LAYERS],
        device_busy_s=[rng.random() for _ in LAYERS],
        caches=[random_cache(rng, tier) for tier in tiers],
        links=[random_link(rng, tier) for tier in tiers],
    )
    value = scrape(experts)
    assert value("moeserve_kv_bytes") == 77
    for cache, link in zip(experts.caches, experts.links, strict=True):
        tier = cache.tier
        assert value("moeserve_expert_slots", tier=tier) == cache.num_slots
        assert value("moeserve_expert_slots_used", tier=tier) == cache.num_used
        assert value("moeserve_expert_slot_bytes", tier=tier) == cache.slot_bytes
        assert value("moeserve_expert_transfers_failed_total", tier=tier) == link.num_failed
        assert value("moeserve_expert_transfer_retries_total", tier=tier) == link.num_retries
        assert value("moeserve_expert_transfers_promoted_total", tier=tier) == link.num_promoted
        for place, layer in enumerate(LAYERS):
            for name, counts in {
                "cache_hits": cache.hits,
                "cache_late": cache.late,
                "cache_misses": cache.misses,
                "cache_evictions": cache.evictions,
                "prefetches": cache.prefetches_begun,
                "prefetches_useful": cache.prefetches_useful,
                "prefetches_wasted": cache.prefetches_wasted,
                "transfer_busy_seconds": link.busy_s,
                "stall_seconds": link.stall_s,
            }.items():
                found = value(f"moeserve_expert_{name}_total", layer=layer, tier=tier)
                assert found == counts[place], name
            for urgency, sizes in {
                "demand": link.demand_bytes,
                "prefetch": link.prefetch_bytes,
            }.items():
                labels = {"layer": layer, "tier": tier, "urgency": urgency}
                assert value("moeserve_expert_transfer_bytes_total", **labels) == sizes[place]
    for place, layer in enumerate(LAYERS):
        for unit, seconds in (("cpu", experts.cpu_busy_s), ("device", experts.device_busy_s)):
            assert seconds is not None
            busy = value("moeserve_expert_busy_seconds_total", layer=layer, unit=unit)
            assert busy == seconds[place]


def test_pages_of_weights() -> None:
    pages = PageStats(
        mapped_bytes=30, cached_huge_bytes=10, moved_bytes=19, moving=True, seconds=1.0, problem=""
    )
    value = scrape(ExpertStats(layers=[], num_experts=[], cpu_busy_s=[]), pages=pages)
    for kind, num_bytes in (("mapped", 30), ("cached_huge", 10), ("moved", 19)):
        assert value("moeserve_weight_pages_bytes", pages=kind) == num_bytes


def test_how_memory_is_divided_and_what_workers_did() -> None:
    rng = random.Random(fresh_seed())
    sizes = ("budget", "weights", "kv", "kv_limit", "experts")
    memory = MemoryStats(
        **{f"{part}_bytes": rng.randrange(10**12) for part in sizes},
        num_kv_grown=rng.randrange(100),
        num_kv_shrunk=rng.randrange(100),
    )
    workers = [random_worker(rng, endpoint) for endpoint in ("ipc:///a", "tcp://b:1")]
    pool = PoolStats(rows=rng.randrange(10**9), taken_over_rows=7, wait_s=1.5, workers=workers)
    experts = ExpertStats(layers=[0], num_experts=[4], cpu_busy_s=[1.5], pool=pool)
    value = scrape(experts, memory)
    for part in sizes:
        assert value("moeserve_host_memory_bytes", part=part) == getattr(memory, f"{part}_bytes")
    for direction, count in (
        ("from_experts", memory.num_kv_grown),
        ("to_experts", memory.num_kv_shrunk),
    ):
        assert value("moeserve_kv_resizes_total", direction=direction) == count
    assert value("moeserve_workers_rows_total") == pool.rows
    assert value("moeserve_workers_taken_over_rows_total") == 7
    assert value("moeserve_workers_wait_seconds_total") == 1.5
    for each in workers:
        name = each.endpoint
        assert value("moeserve_worker_live", worker=name) == each.live
        assert value("moeserve_worker_busy_seconds_total", worker=name) == each.busy_s
        for field in ("jobs", "rows", "connects", "losses", "refusals"):
            assert value(f"moeserve_worker_{field}_total", worker=name) == getattr(each, field)
        for way in ("sent", "received"):
            found = value("moeserve_worker_bytes_total", worker=name, direction=way)
            assert found == getattr(each, f"{way}_bytes")


def random_worker(rng: random.Random, endpoint: str) -> WorkerStats:
    return WorkerStats(
        endpoint=endpoint,
        shard="0/2",
        live=rng.random() < 0.5,
        standby=False,
        shared_memory=True,
        problem="",
        jobs=rng.randrange(10**6),
        rows=rng.randrange(10**6),
        sent_bytes=rng.randrange(10**12),
        received_bytes=rng.randrange(10**12),
        busy_s=rng.random(),
        connects=rng.randrange(9),
        losses=rng.randrange(9),
        refusals=rng.randrange(9),
    )


def test_where_everything_is_resident_there_is_no_cache_to_show() -> None:
    value = scrape(ExpertStats(layers=[0], num_experts=[4], cpu_busy_s=[1.5]))
    assert value("moeserve_expert_busy_seconds_total", layer=0, unit="cpu") == 1.5
    shown = {name for name, _ in value.values if name.startswith("moeserve_expert_")}
    assert shown == {"moeserve_expert_busy_seconds_total"}
    assert not any(("unit", "device") in labels for _, labels in value.values)
