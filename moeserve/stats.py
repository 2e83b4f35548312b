"""What an engine says of its experts: slots, uses, copies, times. Counters run since its start."""

from __future__ import annotations

import msgspec


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """The slots of one tier. Lists: one entry per MoE layer, in the order of ExpertStats.layers.

    Uses are counted per step and expert, not per row. A prefetch is useful once its expert is
    wanted while it has a slot, wasted when it loses the slot unused.
    """

    tier: str
    num_slots: int
    num_used: int  # slots that hold an expert, or are being written
    num_owed: int  # slots in use beyond num_slots, to be given up when they are released
    slot_bytes: int
    hits: list[int]
    late: list[int]  # wanted while on its way
    misses: list[int]
    evictions: list[int]
    prefetches_begun: list[int]
    prefetches_useful: list[int]
    prefetches_wasted: list[int]


class LinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """What was copied into one tier. Lists as in CacheStats.

    busy_s: at least one copy ran; the time is the layer's whose piece of a record ended it.
    stall_s: the step waited for the layer's experts.
    """

    tier: str  # that is written
    demand_bytes: list[int]
    prefetch_bytes: list[int]
    busy_s: list[float]
    stall_s: list[float]
    num_demands: int
    num_prefetches: int
    num_promoted: int  # prefetches that a step came to wait for
    num_failed: int
    num_retries: int


class MemoryStats(msgspec.Struct, frozen=True, kw_only=True):
    """What the host's memory is given to, where kv and experts share a budget.

    kv_bytes: for blocks that may be used now. kv_limit_bytes: for as many as there may ever be.
    experts_bytes: of their slots. What is left is less than a slot, or all experts have one.
    """

    budget_bytes: int
    weights_bytes: int  # that every token needs
    kv_bytes: int
    kv_limit_bytes: int
    experts_bytes: int
    num_kv_grown: int  # how often kv took memory from experts
    num_kv_shrunk: int  # and gave some back


class PageStats(msgspec.Struct, frozen=True, kw_only=True):
    """The pages that mapped weights stand in.

    cached_huge_bytes: the page cache has them in huge pages. moved_bytes: moved from small pages
    into huge ones of this process. moving: that goes on. seconds: it took, or has taken so far.
    problem: why the rest stays as the page cache has it, "" where nothing prevents it.
    """

    mapped_bytes: int
    cached_huge_bytes: int
    moved_bytes: int
    moving: bool
    seconds: float
    problem: str


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True):
    """One expert worker, as its engine sees it.

    shard: "" before the first session. problem: why it is not live, "" where it is. rows: each with
    one expert. Bytes: of rows and of results, in frames or in shared memory. busy_s: it computed.
    connects: sessions that began; losses: that broke; refusals: that the engine would not have.
    """

    endpoint: str
    shard: str
    live: bool
    standby: bool
    shared_memory: bool
    problem: str
    jobs: int
    rows: int
    sent_bytes: int
    received_bytes: int
    busy_s: float
    connects: int
    losses: int
    refusals: int


class PoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """The expert workers of an engine. rows: given to workers. taken_over_rows: computed by another
    worker or the engine in the place of one that was gone. wait_s: steps waited for workers with
    nothing else left to do."""

    rows: int
    taken_over_rows: int
    wait_s: float
    workers: list[WorkerStats]


class ExpertStats(msgspec.Struct, frozen=True, kw_only=True):
    """layers: indices of the MoE layers; all lists are in that order.

    cpu_busy_s: experts were computed on the CPU. device_busy_s: on a device; None where nobody
    measures it. caches, links: of tiers that hold fewer experts than there are, fastest first.
    """

    layers: list[int]
    num_experts: list[int]
    cpu_busy_s: list[float]
    device_busy_s: list[float] | None = None
    caches: list[CacheStats] = []
    links: list[LinkStats] = []
    pool: PoolStats | None = None  # expert workers
