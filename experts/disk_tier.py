"""Sets up the host tier over the disk: slots, threads, costs, schedulers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from moeserve.cache.expert_cache import ExpertCache, Tier
from moeserve.cache.floors import check_floor
from moeserve.cache.policies.registry import build_policy
from moeserve.cache.tiers.disk_store import DiskRecord, DiskStore
from moeserve.cache.tiers.disk_tuning import tune_disk
from moeserve.cache.tiers.host_slots import HostSlots
from moeserve.cache.transfer import Transfers
from moeserve.chores import Chores
from moeserve.config import ExpertConfig
from moeserve.core import ExpertKey, ExpertSpec
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.experts.disk_supply import DiskSupply
from moeserve.experts.schedule.cost_model import CostModel, roofline
from moeserve.experts.schedule.curve import Curve
from moeserve.experts.schedule.intra_layer import FetchOrder
from moeserve.timeline import Timeline

logger = logging.getLogger(__name__)

#: about what one thread reads at a time, and so the longest that a demand waits for a prefetch to
#: yield
CHUNK_BYTES = 1 << 20
#: read to measure memory bandwidth: far more than any cache holds. No more than the slots will
#: take, which are not written yet: so the start needs no memory that is not needed later
BANDWIDTH_BYTES = 256 << 20


@dataclass(frozen=True)
class DiskTier:
    cache: ExpertCache
    supply: DiskSupply
    intra: FetchOrder
    notes: dict[str, str]

    @property
    def slots_in_words(self) -> str:
        """How many experts have room now."""
        count, total = self.cache.num_slots, self.cache.numbers.total
        return (
            f"{count} of {total} ({count / total:.0%}) have room in the host tier,"
            f" {self.supply.slots.slot_bytes} bytes each; all are on disk"
        )


def build_disk_tier(
    config: ExpertConfig,
    specs: Mapping[int, ExpertSpec],
    records: Mapping[ExpertKey, DiskRecord],
    native: NativeRuntime,
    timeline: Timeline,
) -> DiskTier:
    """records: of every expert of the layers in `specs`.

    As many slots as `config` allows if experts were all that memory is for, and at least two; who
    knows what else there is makes them fewer (`ExpertRuntime.resize_host_memory`) before any is
    written, or refuses the budget and says what would be enough. Raises ConfigError where floors
    have no room, StoreError where files cannot be read.
    """
    slot_bytes = max(record.num_bytes for record in records.values())
    affordable = min(len(records), (config.host_memory_bytes or 0) // slot_bytes)
    num_slots = config.host_slots or max(2, affordable)
    check_floor(config.layer_floor, len(specs), num_slots)
    store = DiskStore(records)
    tuning = tune_disk(store, slot_bytes, CHUNK_BYTES, num_slots)
    num_threads = config.disk_threads or tuning.num_threads
    slots = HostSlots(slot_bytes, num_slots)
    transfers = Transfers(
        store, slots.__getitem__, num_threads, CHUNK_BYTES, timeline, tuning.prefetch_threads
    )
    num_experts = {layer: spec.num_experts for layer, spec in specs.items()}
    policy = config.tier_policy
    cache = ExpertCache(
        Tier.HOST, num_experts, num_slots, build_policy(policy, num_experts), config.layer_floor
    )
    # One chore a layer from the policy, and one from a predictor that learns: what is known is two
    # to four steps old at most. In virtual time nothing is missed for it, and a tier that rarely
    # waits learns while it does.
    chores = Chores(most=4 * len(num_experts))
    cache.policy.put_off = chores.put_off
    read_rate = native.handle.measure_read_bandwidth(
        min(BANDWIDTH_BYTES, num_slots * slots.slot_bytes)
    )
    dot_rate = native.handle.measure_dot_peak("f32")
    costs: dict[int, CostModel] = {}
    for layer, spec in specs.items():
        num_bytes = records[ExpertKey(layer, 0)].num_bytes
        costs[layer] = CostModel(
            expert_bytes=num_bytes,
            cpu=roofline(num_bytes, spec.num_weights, read_rate, dot_rate),
            cpu_start_us=0.0,
            disk=Curve([num_bytes], [num_bytes / tuning.best_bytes_per_s * 1e6]),
        )
    how = "past the page cache" if store.direct else "through the page cache, which is given back"
    notes = {
        "disk": f"{tuning.best_bytes_per_s / 1e9:.2f} GB/s by {num_threads} threads, "
        f"{min(num_threads, tuning.prefetch_threads)} of them on a guess, {how}",
        "policy": policy,
    }
    awake = native.awake(config.stall_spin_us)
    supply = DiskSupply(cache, store, slots, transfers, chores, awake)
    return DiskTier(cache, supply, FetchOrder(costs), notes)
