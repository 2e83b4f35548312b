"""Stage 2 on recorded traffic."""

from __future__ import annotations

import pytest
from support.small_plans import deploy

from moeserve.config import KvConfig
from moeserve.core import ConfigError
from moeserve.experts.schedule.profile import Profile
from moeserve.planner.plan_types import (
    Traffic,
)
from moeserve.planner.shapes import ModelShape
from moeserve.planner.simulate import traffic
from moeserve.planner.simulate.system import (
    simulate,
)
from moeserve.planner.simulate.traffic import simulate_traffic
from moeserve.planner.workload import Workload, WorkloadRequest
from moeserve.planner.workload_outcome import SloTargets


def workload(gap_s: float, count: int = 12) -> Workload:
    requests = (WorkloadRequest(gap_s * rank, 20 + rank, 5 + rank % 3) for rank in range(count))
    return Workload("made", tuple(requests))


def test_the_ends_are_the_same_in_a_process_of_their_own(
    shape: ModelShape, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment, slo = deploy(shape, profile), SloTargets(ttft_s=0.1, tpot_s=0.1)
    here = simulate_traffic(deployment, workload(1e-3, 30), slo)
    monkeypatch.setattr(traffic, "APART_TOKENS", 1)
    assert simulate_traffic(deployment, workload(1e-3, 30), slo) == here


def test_traffic_that_comes_slowly_is_served_at_once(shape: ModelShape, profile: Profile) -> None:
    deployment = deploy(shape, profile)
    alone = simulate(
        deploy(shape, profile, Traffic(concurrency=1, prompt_tokens=25, output_tokens=6))
    )
    slo = SloTargets(ttft_s=2 * alone.ttft_s.mid, tpot_s=2 * alone.tpot_s.mid)
    calm = simulate_traffic(deployment, workload(1.0), slo)
    assert calm.mid.attained == 1
    assert calm.most_at_once == 1
    assert calm.mid.goodput_per_s == pytest.approx(12 / calm.mid.span_s)
    assert calm.mid.ttft_s[50] == pytest.approx(alone.ttft_s.mid, rel=0.2)
    crowded = simulate_traffic(deployment, workload(1e-5, 60), slo)
    assert crowded.mid.attained < 1
    assert 12 < crowded.most_at_once <= 60
    assert crowded.low.attained <= crowded.mid.attained <= crowded.high.attained
    assert crowded.mid.output_tokens_per_s > calm.mid.output_tokens_per_s


def test_requests_beyond_the_context_or_the_pool_are_named(
    shape: ModelShape, profile: Profile
) -> None:
    long = Workload("long", (WorkloadRequest(0.0, 3000, 5),))
    with pytest.raises(ConfigError, match=r"3005 tokens.*context is 2048.*--clip 2048"):
        simulate_traffic(deploy(shape, profile), long, SloTargets())
    tight = deploy(shape, profile, kv=KvConfig(num_blocks=8))
    with pytest.raises(ConfigError, match="kv pool holds 128"):
        simulate_traffic(tight, Workload("a", (WorkloadRequest(0.0, 300, 5),)), SloTargets())
    short = long.clipped(128)
    assert short.requests[0] == WorkloadRequest(0.0, 123, 5)
