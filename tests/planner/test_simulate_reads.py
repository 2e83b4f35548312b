"""What a simulated disk and a simulated link take for reads, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from support import engine_profile as made

from moeserve.cache.expert_cache import ExpertCache, Tier
from moeserve.cache.policies.registry import build_policy
from moeserve.cache.types import ExpertState
from moeserve.core import ExpertKey, Placement
from moeserve.experts.schedule.profile import DiskPoint, Figure, Profile
from moeserve.planner.disk_times import read_time_us
from moeserve.planner.simulate.link import SimulatedLink


def test_reads_are_faster_together(profile: Profile) -> None:
    """As if each chunk ended by itself: the fewer are left, the slower they are read."""
    record, known = 1 << 20, {p.queue_depth: p.bytes_per_s.value for p in profile.disk}
    deepest = max(known)
    for count in (1, 2, deepest, 40):
        expected_s = 0.0
        for left in range(count, 0, -1):
            rate = np.interp(min(left, deepest), sorted(known), [known[n] for n in sorted(known)])
            expected_s += record / float(rate)
        found_us = read_time_us(profile.disk, record, count, deepest)
        assert found_us == pytest.approx(expected_s * 1e6)
        whole = read_time_us(profile.disk, count * record, 1, deepest)
        assert whole == pytest.approx(expected_s * 1e6), "chunks of one record"
    one, many = (read_time_us(profile.disk, record, count, None) for count in (1, 1000))
    assert one == pytest.approx(record / (made.DISK_BYTES_PER_S / 2) * 1e6)
    assert many == pytest.approx(1000 * record / made.DISK_BYTES_PER_S * 1e6, rel=0.01)
    assert read_time_us(profile.disk, record, 0, None) == 0
    assert read_time_us(profile.disk, record, 8, 1) == pytest.approx(8 * one)


def test_blocks_that_were_not_measured_lie_on_a_line() -> None:
    """2 us to begin a read, then 1 GB/s; smaller ones too, beyond them the rate is known."""
    disk = [
        DiskPoint(
            block_bytes=size,
            queue_depth=1,
            bytes_per_s=Figure(value=size / (2e-6 + size * 1e-9)),
        )
        for size in (64 << 10, 512 << 10)
    ]
    for record in (16 << 10, 100 << 10, 512 << 10):
        assert read_time_us(disk, record, 3, 1) == pytest.approx(3 * (2 + record * 1e-3))
    rate = disk[1].bytes_per_s.value
    assert read_time_us(disk, 1 << 20, 1, 1) == pytest.approx((1 << 20) / rate * 1e6)


def test_a_link_moves_prefetches_when_no_demand_does() -> None:
    cache = ExpertCache(Tier.HOST, {0: 8}, 8, build_policy("lru", {0: 8}))
    link = SimulatedLink(cache, 10.0)
    link.begin(cache.prefetch([ExpertKey(0, e) for e in range(3)]))
    link.advance(15.0)
    assert link.loading(0) == {1: 5.0, 2: 10.0}
    with cache.acquire(Placement(0, fetch_first=(1, 5), on_cpu=(0,))):
        assert link.demand([ExpertKey(0, 1), ExpertKey(0, 5)]) == [20.0, 30.0]
    assert link.demand([], there_us=[]) == []
    link.cancel()
    assert cache.state(ExpertKey(0, 2)) is ExpertState.ABSENT
    assert link.busy_us == 30.0
    with cache.acquire(Placement(0, fetch_first=(2,))):
        assert link.demand([ExpertKey(0, 2)], there_us=[100.0]) == [110.0]
