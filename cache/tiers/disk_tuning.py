"""How many threads read records fastest from this disk, found by reading some."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
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
#: the same for threads that read on a guess: what they have in flight, a demand waits behind, which
#: costs more than a tenth of the bandwidth (docs/log.md)
NEAR_AHEAD = 0.9


@dataclass(frozen=True)
class DiskTuning:
    """bytes_per_s: of whole records, by number of threads; num_threads: the choice;
    prefetch_threads: how many of them read what no step waits for."""

    bytes_per_s: dict[int, float]
    num_threads: int
    prefetch_threads: int

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
            num_bytes = sum(store.num_bytes(load.key) for load in loads)
            rates[num_threads] = read_rate(transfers, loads, num_bytes)
        finally:
            transfers.close()
    return choose_threads(rates)


def choose_threads(bytes_per_s: dict[int, float]) -> DiskTuning:
    """bytes_per_s: by number of threads."""
    fastest = max(bytes_per_s.values())

    def fewest(near: float) -> int:
        return min(n for n, rate in bytes_per_s.items() if rate >= near * fastest)

    return DiskTuning(bytes_per_s, fewest(NEAR), fewest(NEAR_AHEAD))


def read_rate(transfers: Transfers, loads: Sequence[Load], num_bytes: int) -> float:
    """Bytes per second of loads that are ordered together, from the order to the last arrival.
    num_bytes: of all of them. Raises StoreError where one cannot be read."""
    begun_s, left = time.perf_counter(), len(loads)
    transfers.start(loads, Urgency.DEMAND)
    while left:
        for arrival in transfers.wait():
            if arrival.error is not None:
                raise arrival.error
            left -= 1
    return num_bytes / (time.perf_counter() - begun_s)
