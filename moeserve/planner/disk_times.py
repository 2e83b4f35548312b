"""How long reads from disk take, by the disk's measured points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeserve.cache.record_copy import num_chunks
from moeserve.cache.tiers.disk_tuning import NEAR
from moeserve.experts.disk_tier import CHUNK_BYTES
from moeserve.experts.schedule.profile import DiskPoint


def read_time_us(
    points: Sequence[DiskPoint], record_bytes: int, count: int, threads: int | None
) -> float:
    """Of so many records together: chunk by chunk, by as many threads as there are chunks for. The
    last ones have nothing beside them, and are read at the rates of fewer reads in flight.

    threads: that read; None: as few as `tune_disk` would take. 0 where nothing is to be read.
    """
    if not count:
        return 0.0
    rates = {depth: _rate(points, record_bytes, depth) for depth in {p.queue_depth for p in points}}
    depths = sorted(rates)
    enough = [depth for depth in depths if rates[depth] >= NEAR * max(rates.values())]
    chunks = count * num_chunks(record_bytes, CHUNK_BYTES)
    most = min(chunks, threads or enough[0])
    in_flight = np.interp(np.arange(1, most + 1), depths, [rates[each] for each in depths])
    of_full = (chunks - most) / in_flight[-1]
    return float(of_full + (1 / in_flight).sum()) * count * record_bytes / chunks * 1e6


def _rate(points: Sequence[DiskPoint], record_bytes: int, depth: int) -> float:
    """Bytes per second of such records with so many reads in flight. Between two sizes that were
    measured a record takes a time between theirs, below them the same line goes on; beyond them it
    takes a time in proportion, and so with one size alone."""
    times = {
        p.block_bytes: p.block_bytes / p.bytes_per_s.value for p in points if p.queue_depth == depth
    }
    sizes = sorted(times)
    least, largest = sizes[0], sizes[-1]
    if record_bytes >= largest or len(sizes) == 1:
        return largest / times[largest]
    if record_bytes > least:
        return record_bytes / float(np.interp(record_bytes, sizes, [times[n] for n in sizes]))
    slope = (times[sizes[1]] - times[least]) / (sizes[1] - least)
    time_s = times[least] - slope * (least - record_bytes)
    return record_bytes / max(time_s, times[least] * record_bytes / least)
