"""Stage 2 against sums by hand, against the cache's own replay, and what must hold of any run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from support import engine_profile as made
from support.engine_profile import made_profile, product_us, read_config
from support.known_configs import SMALL_DENSE
from support.routing_samples import topical_trace

from moeserve.cache.policies.registry import build_policy
from moeserve.cache.replay import Rules, through_cache
from moeserve.cache.routing_trace import RoutingTrace, one_by_one
from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.core import ConfigError, MoeserveError
from moeserve.engine.simulation import Simulation
from moeserve.experts.schedule.profile import Profile
from moeserve.experts.schedule.profile_file import shipped_profile
from moeserve.planner.deployment import sized
from moeserve.planner.plan_types import (
    Deployment,
    Estimate,
    PlanRequest,
    Resource,
    StepLoad,
    Traffic,
)
from moeserve.planner.shapes import ModelShape
from moeserve.planner.simulate import traffic
from moeserve.planner.simulate.closed import requests_of
from moeserve.planner.simulate.over_disk import DiskClock
from moeserve.planner.simulate.routing import recorded
from moeserve.planner.simulate.system import (
    choose_routing,
    make_clock,
    simulate,
    simulate_quickly,
    steady_window,
)
from moeserve.planner.simulate.traffic import simulate_traffic
from moeserve.planner.step_costs import EngineStepCosts
from moeserve.planner.workload import Workload, WorkloadRequest
from moeserve.planner.workload_outcome import SloTargets

CONFIG = {**made.CALIBRATED, "num_hidden_layers": 2, "num_experts": 16}
TRAFFIC = Traffic(concurrency=4, prompt_tokens=40, output_tokens=12)


@pytest.fixture
def shape(tmp_path: Path) -> ModelShape:
    return read_config(tmp_path, CONFIG)


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return made_profile(tmp_path)


def deploy(
    shape: ModelShape, profile: Profile, traffic: Traffic = TRAFFIC, **settings: Any
) -> Deployment:
    """settings: of ExpertConfig, besides `trace`, `kv` and `scheduler`."""
    engine = EngineConfig(
        model=ModelConfig(model=str(shape.path)),
        kv=settings.pop("kv", KvConfig()),
        scheduler=settings.pop("scheduler", SchedulerConfig()),
        experts=ExpertConfig(**{k: v for k, v in settings.items() if k != "trace"}),
    )
    request = PlanRequest(engine=engine, traffic=traffic, trace=settings.get("trace"))
    return sized(request, profile, shape)


def model_trace(num_tokens: int = 240) -> RoutingTrace:
    """Of CONFIG: 2 layers of 16 experts, 2 of each token."""
    sample = topical_trace(5, num_tokens=num_tokens, num_layers=2, num_experts=16, top_k=2)
    return replace(sample, num_experts=16)


def save(trace: RoutingTrace, path: Path) -> Path:
    lens = np.array([request.length for request in trace.requests])
    np.savez(path, ids=trace.ids.astype(np.uint8), probs=trace.weights, lens=lens)
    return path


def test_one_client_alone_is_the_sum_of_its_steps(shape: ModelShape, profile: Profile) -> None:
    traffic = Traffic(concurrency=1, prompt_tokens=1, output_tokens=4)
    found = simulate(deploy(shape, profile, traffic))
    layer = shape.layers[0]

    def step_us(context: int) -> float:
        products = sum(product_us(m.rows * m.cols, 1) for m in layer.products)
        attention = made.CALL_US + (made.KV_US * 2 + made.OP_US * 4) * context * 128
        experts = 2 * product_us(3 * 256 * 128, 1) + made.START_US
        of_layer = products + attention + made.AROUND_ATTENTION_US + experts
        head = product_us(shape.head.rows * shape.head.cols, 1) + made.SAMPLE_US * 512
        return 2 * of_layer + head + made.ONCE_US + made.SEQUENCE_US + made.ROW_ONCE_US

    assert found.ttft_s.mid == pytest.approx(step_us(1) / 1e6, rel=0.01)
    assert found.tpot_s.mid == pytest.approx(np.mean([step_us(n) for n in (2, 3, 4)]) / 1e6, 0.01)
    whole_s = sum(step_us(n) for n in (1, 2, 3, 4)) / 1e6
    assert found.output_tokens_per_s.mid == pytest.approx(4 / whole_s, rel=0.01)


def test_the_same_seed_gives_the_same_estimate(shape: ModelShape, profile: Profile) -> None:
    deployment = deploy(shape, profile, host_slots=12)
    first, second, other = (simulate_quickly(deployment, seed) for seed in (3, 3, 4))
    assert first == second
    assert other.tpot_s != first.tpot_s


def test_ranges_hold_the_middle_and_sheets_are_trusted_less(
    shape: ModelShape, profile: Profile
) -> None:
    deployment = deploy(shape, profile)
    measured = simulate(deployment)
    sheet = simulate(replace(deployment, profile=structs.replace(profile, source="datasheet")))
    for estimate in (measured, sheet):
        for value in (estimate.ttft_s, estimate.tpot_s, estimate.output_tokens_per_s):
            assert value.low < value.mid < value.high
    assert sheet.confidence < measured.confidence
    assert sheet.tpot_s.high > measured.tpot_s.high
    assert "no routing is known" in measured.basis


def test_hits_are_those_of_the_engine_s_own_cache(shape: ModelShape, profile: Profile) -> None:
    trace = model_trace()
    deployment = deploy(shape, profile, host_slots=16, policy="lru")
    costs = EngineStepCosts(shape, profile)
    clock = DiskClock(costs, recorded(trace, shape), 64, deployment)
    steps = one_by_one(trace.requests)
    wanted = through_cache(trace, steps, build_policy("lru", trace.experts_per_layer), Rules(0.5))
    found = [clock._step(np.asarray(step), 0.0).hits for step in steps]
    assert found == wanted


def test_only_steps_over_the_disk_cost_what_such_steps_do(
    shape: ModelShape, profile: Profile
) -> None:
    routing, load = recorded(model_trace(), shape), StepLoad([40, 50])
    resident, settled, over_disk = (
        make_clock(deploy(shape, profile, **settings), routing)._costs.step_work(load).us
        for settings in ({}, {"host_slots": 32}, {"host_slots": 16})
    )
    once_us = made.ONCE_US + 2 * made.SEQUENCE_US + 2 * made.ROW_ONCE_US
    assert settled == resident, "slots for all experts"
    assert over_disk - resident == pytest.approx((made.COLDER - 1) * once_us, rel=0.01)


def test_more_slots_more_hits_more_speed(
    shape: ModelShape, profile: Profile, tmp_path: Path
) -> None:
    trace = save(model_trace(), tmp_path / "trace.npz")
    found = [
        simulate_quickly(deploy(shape, profile, host_slots=slots, trace=trace)) for slots in (4, 24)
    ]
    rates = [estimate.hit_rate or 0.0 for estimate in found]
    speeds = [estimate.output_tokens_per_s.mid for estimate in found]
    assert rates == sorted(rates)
    assert speeds == sorted(speeds)
    assert found[0].limits[-1].resource is Resource.DISK
    resident = simulate(deploy(shape, profile, trace=trace))
    assert resident.hit_rate is None
    assert resident.output_tokens_per_s.mid > speeds[-1]
    assert "trace.npz" in resident.basis


def test_two_slots_are_enough_for_any_batch(shape: ModelShape, profile: Profile) -> None:
    found = simulate_quickly(deploy(shape, profile, host_slots=2))
    assert found.hit_rate is not None
    assert found.hit_rate < 0.2


def test_a_slower_disk_is_what_limits(shape: ModelShape, profile: Profile) -> None:
    fast, slow = (
        simulate_quickly(deploy(shape, structs.replace(profile, disk=disk), host_slots=8))
        for disk in (
            profile.disk,
            [
                structs.replace(p, bytes_per_s=structs.replace(p.bytes_per_s, value=1e7))
                for p in profile.disk
            ],
        )
    )
    assert slow.tpot_s.mid > 3 * fast.tpot_s.mid
    for limit in slow.limits:
        assert limit.resource is Resource.DISK
        assert limit.headroom > 1


def test_a_layer_over_the_disk_by_hand(shape: ModelShape, profile: Profile) -> None:
    """Two experts are there and two arrive, the second while the first is computed."""
    deployment = deploy(shape, profile, host_slots=16)
    clock = DiskClock(
        EngineStepCosts(shape, profile), recorded(model_trace(), shape), 64, deployment
    )
    tier, one_us = clock._tier, product_us(3 * 256 * 128, 1)
    first, second = 1000.0, 1000.0 + made.LATE_US + 1.0
    us, own_us, runs = clock._beside_reading(20.0, [1, 1], 0.0, [1, 1], np.array([first, second]))
    numbers = made.NUMBER_US * 256
    beside = made.BESIDE * 1.0  # of the second read beside the first one's run
    last = made.START_US + one_us + made.RUN_US + numbers
    assert us == pytest.approx(first + made.LATE_US + last + beside + last + made.RUN_US, rel=1e-3)
    assert runs == 4
    alone_us = made.START_US + 2 * one_us + made.RUN_US + 2 * numbers
    slowed = alone_us / (1 - made.BESIDE)  # the reads go on until it is over
    assert tier.run_us(made.START_US + 2 * one_us, 512, 1e6) == pytest.approx(slowed, rel=1e-3)
    assert own_us == pytest.approx(
        20 + slowed - made.START_US - 2 * one_us + 3 * made.RUN_US + 2 * numbers + beside, rel=1e-3
    )


def test_clients_that_wait_for_kv_are_named(shape: ModelShape, profile: Profile) -> None:
    traffic = Traffic(concurrency=16, prompt_tokens=64, output_tokens=16)
    kv = KvConfig(num_blocks=20)
    found = simulate_quickly(deploy(shape, profile, traffic, kv=kv))
    decode = next(limit for limit in found.limits if limit.phase == "decode")
    assert decode.resource is Resource.KV_ROOM
    roomy = simulate_quickly(deploy(shape, profile, traffic))
    assert roomy.output_tokens_per_s.mid > found.output_tokens_per_s.mid


def test_a_trace_of_another_model_is_refused(
    shape: ModelShape, profile: Profile, tmp_path: Path
) -> None:
    other = topical_trace(1, num_tokens=40, num_layers=3, num_experts=16, top_k=2)
    trace = save(other, tmp_path / "other.npz")
    with pytest.raises(MoeserveError, match=r"trace: .*3 MoE layers"):
        simulate(deploy(shape, profile, trace=trace))


def test_a_device_and_a_dense_model(tmp_path: Path, shape: ModelShape) -> None:
    sheet = shipped_profile("rtx4090-pcie4")
    request = PlanRequest(
        engine=EngineConfig(
            model=ModelConfig(model=str(shape.path), device="emulated"),
            experts=ExpertConfig(device_slots=16),
        ),
        traffic=TRAFFIC,
    )
    found = simulate(sized(request, sheet, shape))
    assert found.hit_rate is not None
    assert 0 < found.hit_rate < 1
    dense = read_config(tmp_path, SMALL_DENSE)
    estimate = simulate(deploy(dense, made_profile(tmp_path)))
    assert estimate.hit_rate is None
    assert estimate.basis.startswith("a dense model")


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


def on_device(shape: ModelShape, trace: Path | None = None, **experts: Any) -> Estimate:
    request = PlanRequest(
        engine=EngineConfig(
            model=ModelConfig(model=str(shape.path), device="emulated"),
            experts=ExpertConfig(**experts),
        ),
        traffic=TRAFFIC,
        trace=trace,
    )
    return simulate_quickly(sized(request, shipped_profile("rtx4090-pcie4"), shape))


def test_three_tiers_lie_between_two(shape: ModelShape) -> None:
    """More host slots read less, and with all of them it is the device over host memory."""
    found = [on_device(shape, device_slots=6, host_slots=slots) for slots in (4, 16, 32)]
    speeds = [estimate.output_tokens_per_s.mid for estimate in found]
    assert speeds == sorted(speeds)
    assert found[0].limits[-1].resource is Resource.DISK
    whole = on_device(shape, device_slots=6)
    assert found[-1].output_tokens_per_s == whole.output_tokens_per_s
    assert speeds[0] < speeds[-1]


def test_what_is_foreseen_is_there(shape: ModelShape, profile: Profile, tmp_path: Path) -> None:
    """Two experts that take turns: who has seen it reads ahead beside what lies between layers."""
    ids = np.tile(np.array([[[0, 1]] * 2, [[2, 3]] * 2, [[4, 5]] * 2]), (200, 1, 1))
    weights = np.full(ids.shape, 0.5, np.float32)
    path = tmp_path / "turns.npz"
    np.savez(path, ids=ids.astype(np.uint8), probs=weights, lens=np.array([len(ids)]))
    one = Traffic(concurrency=1, prompt_tokens=20, output_tokens=60)
    none, markov = (
        simulate(
            deploy(shape, profile, one, host_slots=8, policy="lru", trace=path, predictor=name)
        )
        for name in ("none", "markov")
    )
    assert (markov.hit_rate or 0) > (none.hit_rate or 0) + 0.2
    assert markov.tpot_s.mid < none.tpot_s.mid


@pytest.mark.parametrize(
    ("concurrency", "max_running", "num_blocks"), [(11, 2, 400), (30, 4, 400), (24, 64, 13)]
)
def test_clients_that_can_only_wait_are_reckoned(
    concurrency: int, max_running: int, num_blocks: int, tmp_path: Path, shape: ModelShape
) -> None:
    """All of them simulated wait as long as is said of those that are left out, whether settings or
    kv keep them waiting."""
    traffic = replace(TRAFFIC, concurrency=concurrency)
    deployment = deploy(
        shape,
        made_profile(tmp_path),
        traffic,
        scheduler=SchedulerConfig(max_running=max_running),
        kv=KvConfig(num_blocks=num_blocks),
    )
    found = simulate_quickly(deployment)
    clock = make_clock(deployment, choose_routing(deployment, 0, alone=True).mid)
    engine = deployment.request.engine
    whole = Simulation(engine.scheduler, num_blocks, engine.kv.block_tokens, clock)
    result = whole.run_closed(requests_of(traffic, 4 * concurrency), concurrency)
    window = steady_window(result.requests, concurrency)
    waited_s = np.mean([times.ttft_s for times in window.requests])
    assert found.ttft_s.mid == pytest.approx(waited_s, rel=0.05)
    tokens = sum(n for at_s, n in result.emitted if window.begin_s < at_s <= window.end_s)
    rate = tokens / (window.end_s - window.begin_s)
    assert found.output_tokens_per_s.mid == pytest.approx(rate, rel=0.05)
    by_kv = any(limit.resource is Resource.KV_ROOM for limit in found.limits)
    assert by_kv == (num_blocks == 13)
