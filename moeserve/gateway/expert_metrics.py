"""Prometheus metrics of the tiered expert cache: labels `layer` (index in the model) and `tier`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from moeserve.stats import CacheStats, ExpertStats, LinkStats, MemoryStats, PageStats, PoolStats

#: field of CacheStats -> name and help
CACHE_COUNTERS: Final = MappingProxyType(
    {
        "hits": ("cache_hits", "Uses of an expert that stood in its slot, per step and expert."),
        "late": ("cache_late", "Uses of an expert that was on its way."),
        "misses": ("cache_misses", "Uses of an expert that had no slot."),
        "evictions": ("cache_evictions", "Experts that lost their slot to another one."),
        "prefetches_begun": ("prefetches", "Copies begun on a guess."),
        "prefetches_useful": ("prefetches_useful", "Guesses that a step came to want."),
        "prefetches_wasted": ("prefetches_wasted", "Guesses that lost their slot unused."),
    }
)


#: field of WorkerStats -> name and help
WORKER_COUNTERS: Final = MappingProxyType(
    {
        "jobs": ("jobs", "Jobs given to it: a layer's rows, or a piece of them."),
        "rows": ("rows", "Rows in them, each with one expert."),
        "busy_s": ("busy_seconds", "It computed, as it says."),
        "connects": ("connects", "Sessions that began, the first one included."),
        "losses": ("losses", "Sessions that broke or took too long."),
        "refusals": ("refusals", "Times that the engine would not use it."),
    }
)


def expert_metrics(stats: ExpertStats) -> list[Metric]:
    """Counters per layer; tiers in which every expert has its place have none."""
    busy = _per_layer("busy_seconds", "Time in which experts were computed.", ("unit",))
    _add(busy, stats.layers, stats.cpu_busy_s, "cpu")
    if stats.device_busy_s is not None:
        _add(busy, stats.layers, stats.device_busy_s, "device")
    metrics: list[Metric] = [busy]
    if stats.caches:
        metrics += _of_caches(stats.layers, stats.caches)
    if stats.links:
        metrics += _of_links(stats.layers, stats.links)
    if stats.pool is not None:
        metrics += _of_workers(stats.pool)
    return metrics


def memory_metrics(stats: MemoryStats) -> Iterator[Metric]:
    """How the budget of the host's memory is divided now."""
    parts = GaugeMetricFamily(
        "moeserve_host_memory_bytes",
        "The budget, and what of it is given to whom; kv_limit: what kv may take from experts.",
        labels=("part",),
    )
    for part in ("budget", "weights", "kv", "kv_limit", "experts"):
        parts.add_metric((part,), getattr(stats, f"{part}_bytes"))
    yield parts
    changes = CounterMetricFamily(
        "moeserve_kv_resizes", "Memory that changed hands, times.", labels=("direction",)
    )
    changes.add_metric(("from_experts",), stats.num_kv_grown)
    changes.add_metric(("to_experts",), stats.num_kv_shrunk)
    yield changes


def page_metrics(stats: PageStats) -> Iterator[Metric]:
    """How much of the mapped weights stands in huge pages."""
    pages = GaugeMetricFamily(
        "moeserve_weight_pages_bytes",
        "Weights in the page cache (mapped); in huge pages there; moved into huge pages since.",
        labels=("pages",),
    )
    for kind in ("mapped", "cached_huge", "moved"):
        pages.add_metric((kind,), getattr(stats, f"{kind}_bytes"))
    yield pages


def _of_caches(layers: Sequence[int], caches: Sequence[CacheStats]) -> Iterator[Metric]:
    for field, (name, text) in CACHE_COUNTERS.items():
        metric = _per_layer(name, text)
        for cache in caches:
            _add(metric, layers, getattr(cache, field), cache.tier)
        yield metric
    for field, name, text in (
        ("num_slots", "slots", "Experts that the tier has room for."),
        ("num_used", "slots_used", "Slots that hold an expert, or are being written."),
        ("slot_bytes", "slot_bytes", "Size of a slot."),
    ):
        gauge = GaugeMetricFamily(f"moeserve_expert_{name}", text, labels=("tier",))
        for cache in caches:
            gauge.add_metric((cache.tier,), getattr(cache, field))
        yield gauge


def _of_links(layers: Sequence[int], links: Sequence[LinkStats]) -> Iterator[Metric]:
    num_bytes = _per_layer("transfer_bytes", "Copied into the tier.", ("tier", "urgency"))
    busy = _per_layer("transfer_busy_seconds", "Time in which records were copied into the tier.")
    stall = _per_layer("stall_seconds", "Time that steps waited for experts.")
    for link in links:
        _add(num_bytes, layers, link.demand_bytes, link.tier, "demand")
        _add(num_bytes, layers, link.prefetch_bytes, link.tier, "prefetch")
        _add(busy, layers, link.busy_s, link.tier)
        _add(stall, layers, link.stall_s, link.tier)
    yield from (num_bytes, busy, stall)
    for field, name, text in (
        ("num_promoted", "transfers_promoted", "Prefetches that a step came to wait for."),
        ("num_failed", "transfers_failed", "Records that could not be read."),
        ("num_retries", "transfer_retries", "Reads that were tried again."),
    ):
        counter = CounterMetricFamily(f"moeserve_expert_{name}", text, labels=("tier",))
        for link in links:
            counter.add_metric((link.tier,), getattr(link, field))
        yield counter


def _of_workers(pool: PoolStats) -> Iterator[Metric]:
    """By worker, which is its endpoint."""
    live = GaugeMetricFamily("moeserve_worker_live", "1 while it is used.", labels=("worker",))
    for worker in pool.workers:
        live.add_metric((worker.endpoint,), float(worker.live))
    yield live
    for field, (name, text) in WORKER_COUNTERS.items():
        counter = CounterMetricFamily(f"moeserve_worker_{name}", text, labels=("worker",))
        for worker in pool.workers:
            counter.add_metric((worker.endpoint,), getattr(worker, field))
        yield counter
    num_bytes = CounterMetricFamily(
        "moeserve_worker_bytes",
        "Rows sent and results received, in frames or in shared memory.",
        labels=("worker", "direction"),
    )
    for worker in pool.workers:
        num_bytes.add_metric((worker.endpoint, "sent"), worker.sent_bytes)
        num_bytes.add_metric((worker.endpoint, "received"), worker.received_bytes)
    yield num_bytes
    for name, text, value in (
        ("rows", "Rows, each with one expert, that were given to workers.", pool.rows),
        ("taken_over_rows", "Of them those that somebody else computed.", pool.taken_over_rows),
        ("wait_seconds", "Steps waited for workers, with nothing else to do.", pool.wait_s),
    ):
        yield CounterMetricFamily(f"moeserve_workers_{name}", text, value=value)


def _per_layer(name: str, text: str, labels: tuple[str, ...] = ("tier",)) -> CounterMetricFamily:
    return CounterMetricFamily(f"moeserve_expert_{name}", text, labels=("layer", *labels))


def _add(
    metric: CounterMetricFamily, layers: Sequence[int], values: Sequence[float], *labels: str
) -> None:
    for layer, value in zip(layers, values, strict=True):
        metric.add_metric((str(layer), *labels), value)
