"""How many threads read records fastest from this disk, found by reading some."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from moeserve.cache.record_copy import Urgency
from moeserve.cache.tiers.disk_store import DiskStore
from moeserve.cache.tiers.host_slots import HostSlots
from moeserve.cache.transfer import Transfers
from moeserve.cache.types import Load

THREADS = (1, 2, 4, 8)
#: read for each number of threads: enough to be past a device's first milliseconds
TRIAL_BYTES = 96 << 20
#: fewer threads are taken if they come that near to the fastest: each also takes processor time
NEAR = 0.95


@dataclass(frozen=True)
class DiskTuning:
    """bytes_per_s: of whole records, by number of threads; num_threads: the choice."""

    bytes_per_s: dict[int, float]
    num_threads: int

    @property
    def best_bytes_per_s(self) -> float:
        return self.bytes_per_s[self.num_threads]


def tune_disk(
    store: DiskStore, slot_bytes: int, chunk_bytes: int, most_slots: int | None = None
) -> DiskTuning:
    """Reads random records into memory of its own, of at most so many slots. Raises StoreError
    where they cannot be read."""
    keys = sorted(store.keys())
    count = max(1, min(len(keys), TRIAL_BYTES // slot_bytes, most_slots or len(keys)))
    slots = HostSlots(slot_bytes, count)
    generator = random.Random(0)
    rates: dict[int, float] = {}
    for num_threads in THREADS:
        loads = [Load(key, slot) for slot, key in enumerate(generator.sample(keys, count))]
        transfers = Transfers(store, slots.__getitem__, num_threads, chunk_bytes)
        try:
            begun = time.perf_counter()
            transfers.start(loads, Urgency.DEMAND)
            num_bytes = 0
            arrived = 0
            while arrived < count:
                for arrival in transfers.wait():
                    if arrival.error is not None:
                        raise arrival.error
                    arrived += 1
                    num_bytes += store.num_bytes(arrival.load.key)
            rates[num_threads] = num_bytes / (time.perf_counter() - begun)
        finally:
            transfers.close()
    fastest = max(rates.values())
    enough = min(n for n, rate in rates.items() if rate >= NEAR * fastest)
    return DiskTuning(rates, enough)
