"""Stage 2 against sums by hand, and what must hold of any run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from support import engine_profile as made
from support.engine_profile import made_profile, product_us, read_config
from support.known_configs import SMALL_DENSE
from support.routing_samples import topical_trace
from support.small_plans import TRAFFIC, deploy, save

from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.core import MoeserveError
from moeserve.engine.simulation import Simulation
from moeserve.experts.schedule.profile import Profile
from moeserve.experts.schedule.profile_file import shipped_profile
from moeserve.planner.deployment import sized
from moeserve.planner.plan_types import (
    PlanRequest,
    Resource,
    Traffic,
)
from moeserve.planner.shapes import ModelShape
from moeserve.planner.simulate.closed import requests_of
from moeserve.planner.simulate.system import (
    choose_routing,
    make_clock,
    simulate,
    simulate_quickly,
    steady_window,
)


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
