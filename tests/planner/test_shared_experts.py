"""Shared experts in predictions: an expert's costs, hidden behind reads where there are any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from support import engine_profile as made
from support.engine_profile import made_profile, product_us, read_config
from support.routing_samples import topical_trace

from moeserve.config import EngineConfig, ExpertConfig, ModelConfig
from moeserve.experts.schedule.profile import Profile
from moeserve.planner.deployment import sized
from moeserve.planner.plan_types import Deployment, PlanRequest, StepLoad, Traffic
from moeserve.planner.shapes import LayerShape, ModelShape
from moeserve.planner.simulate.over_disk import DiskClock
from moeserve.planner.simulate.routing import recorded
from moeserve.planner.simulate.system import simulate_quickly
from moeserve.planner.step_costs import EngineStepCosts, Products, is_shared

INNER = 640
CONFIG = {
    **made.CALIBRATED,
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": INNER,
    "num_experts": 16,
}
NUM_WEIGHTS = 3 * INNER * 256


@pytest.fixture
def shape(tmp_path: Path) -> ModelShape:
    return read_config(tmp_path, CONFIG)


def over_disk(shape: ModelShape, profile: Profile) -> Deployment:
    engine = EngineConfig(
        model=ModelConfig(model=str(shape.path)),
        experts=ExpertConfig(cpu_backend="native", host_slots=8),
    )
    traffic = Traffic(concurrency=2, prompt_tokens=16, output_tokens=8)
    return sized(PlanRequest(engine=engine, traffic=traffic), profile, shape)


def clock_of(shape: ModelShape, profile: Profile) -> DiskClock:
    trace = topical_trace(5, num_tokens=60, num_layers=2, num_experts=16, top_k=2)
    routing = recorded(replace(trace, num_experts=16), shape)
    costs = EngineStepCosts(shape, profile, over_disk=True)
    return DiskClock(costs, routing, 64, over_disk(shape, profile))


def without_shared(layer: LayerShape) -> LayerShape:
    return replace(layer, products=tuple(m for m in layer.products if not is_shared(m)))


def test_it_costs_what_an_expert_of_its_size_does(tmp_path: Path, shape: ModelShape) -> None:
    profile = made_profile(tmp_path)
    slower = [
        structs.replace(c, us=[structs.replace(f, value=2 * f.value) for f in c.us])
        for c in profile.cpu.expert_curves
    ]
    cpu = structs.replace(profile.cpu, expert_curves=slower)
    before, after = (Products(p) for p in (profile, structs.replace(profile, cpu=cpu)))
    ffn, gate = filter(is_shared, shape.layers[0].products)
    assert ffn.rows * ffn.cols == NUM_WEIGHTS
    for rows in (1, 7, 300):
        assert before.us(ffn, rows) == pytest.approx(product_us(NUM_WEIGHTS, rows), rel=0.01)
        assert after.us(ffn, rows) == pytest.approx(2 * before.us(ffn, rows))
        assert after.us(gate, rows) == before.us(gate, rows)


def test_over_the_disk_it_is_no_part_of_the_layer_between(
    tmp_path: Path, shape: ModelShape
) -> None:
    profile, load = made_profile(tmp_path), StepLoad([30, 20])
    resident, apart = (EngineStepCosts(shape, profile, over_disk=on) for on in (False, True))
    beside = apart.beside_work(0, 2)
    products = sum(apart.products.us(m, 2) for m in shape.layers[0].products if is_shared(m))
    assert beside.us == pytest.approx(products + made.START_US)
    colder_us = (made.COLDER - 1) * made.AROUND_ATTENTION_US
    less_us = resident.layer_work(0, load).us - apart.layer_work(0, load).us
    assert less_us == pytest.approx(products - colder_us, rel=0.01)


def test_it_is_computed_while_records_are_read(tmp_path: Path, shape: ModelShape) -> None:
    """By hand: one expert is there, one arrives; late enough, the shared one takes no time."""
    clock = clock_of(shape, made_profile(tmp_path))
    shared_us = 400.0
    there_us = made.START_US + product_us(3 * 256 * 128, 1) + made.RUN_US + made.NUMBER_US * 256
    for arrival_us in (50.0, there_us + 100.0, 5000.0):
        arrival = np.array([arrival_us])
        without, with_it = (
            clock._beside_reading(0.0, [1], us, [1], arrival)[0] for us in (0.0, shared_us)
        )
        hidden = with_it - without
        if arrival_us == 5000.0:
            assert hidden == pytest.approx(0.0, abs=1e-6)
        else:
            assert 0.5 * shared_us < hidden <= shared_us / (1 - made.BESIDE)


def test_a_slow_disk_hides_it(tmp_path: Path, shape: ModelShape) -> None:
    profile = made_profile(tmp_path)
    alone = replace(shape, layers=tuple(without_shared(layer) for layer in shape.layers))

    def more_s(bytes_per_s: float) -> float:
        disk = [
            structs.replace(p, bytes_per_s=structs.replace(p.bytes_per_s, value=bytes_per_s))
            for p in profile.disk
        ]
        here = structs.replace(profile, disk=disk)
        with_it, without = (simulate_quickly(over_disk(s, here)).tpot_s.mid for s in (shape, alone))
        return with_it - without

    ffn, _ = filter(is_shared, shape.layers[0].products)
    own_s = 2 * product_us(ffn.rows * ffn.cols, 2) / 1e6
    assert more_s(1e12) > 0.8 * own_s, "a disk that takes no time"
    assert more_s(1e7) < 0.2 * own_s
