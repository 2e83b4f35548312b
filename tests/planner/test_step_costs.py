"""What the engine adds is found again from steps that were made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from support import engine_profile as made
from support.engine_profile import made_profile, product_us, read_config
from support.randomness import fresh_seed

from moeserve.experts.schedule.profile import TierPoint
from moeserve.planner.least_squares import fit_costs
from moeserve.planner.plan_types import Chunk, Resource, StepLoad
from moeserve.planner.shapes import ModelShape
from moeserve.planner.step_costs import PER_HEAD, EngineStepCosts, Products, on_other_cpu
from moeserve.planner.step_fit import EngineCosts

OTHER = {
    **made.CALIBRATED,
    "hidden_size": 512,
    "moe_intermediate_size": 192,
    "num_experts": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}


@pytest.fixture
def other(tmp_path: Path) -> ModelShape:
    return read_config(tmp_path, OTHER)


def test_the_fit_finds_what_the_engine_adds(tmp_path: Path, other: ModelShape) -> None:
    engine = EngineStepCosts(other, made_profile(tmp_path)).engine
    once = np.array([made.ONCE_US, made.SEQUENCE_US, made.ROW_ONCE_US])
    assert engine.resident.once == pytest.approx(once, 1e-3)
    assert engine.over_disk.once == pytest.approx(made.COLDER * once, 1e-3)
    assert engine.attention == pytest.approx([made.CALL_US, made.KV_US, made.OP_US], 1e-3)
    around = made.AROUND_ATTENTION_US
    assert engine.resident.around_attention[0] == pytest.approx(around, rel=0.05)
    assert engine.around_experts == pytest.approx([0.0, 0.0], abs=1e-6), "not what recording adds"
    assert engine.over_disk.around_attention[0] == pytest.approx(made.COLDER * around, rel=0.05)
    tier = engine.tier
    assert tier.books == pytest.approx(made.BOOKS_US, rel=0.01)
    assert tier.begin == pytest.approx(made.BEGIN_US, rel=1e-3)
    assert tier.to_read == pytest.approx(made.TO_READ_US, rel=1e-3)
    assert tier.late_us == pytest.approx(made.LATE_US)
    assert tier.runs == pytest.approx([made.RUN_US, made.NUMBER_US, made.BESIDE], rel=0.01)
    assert engine.sampling_us(3, 1000) == pytest.approx(3000 * made.SAMPLE_US, rel=1e-6)


def test_without_a_stall_only_what_follows_one_is_unknown(
    tmp_path: Path, other: ModelShape
) -> None:
    profile = made_profile(tmp_path)
    assert profile.steps is not None

    def engine(tier: list[TierPoint]) -> EngineCosts:
        steps = structs.replace(profile.steps, tier=tier)
        return EngineStepCosts(other, structs.replace(profile, steps=steps)).engine

    points = [
        structs.replace(p, us={name: figure for name, figure in p.us.items() if name != "late"})
        for p in profile.steps.tier
    ]
    known, whole = engine(points).tier, engine(profile.steps.tier).tier
    assert known.late_us == 0 < whole.late_us
    for part in ("books", "begin", "to_read", "runs"):
        assert getattr(known, part) == pytest.approx(getattr(whole, part))
    still = [point for point in points if not point.num_missing]
    assert not engine(still).tier.books.any(), "nothing is read: nothing is known"


def test_a_step_of_another_model_is_the_sum_of_its_parts(tmp_path: Path, other: ModelShape) -> None:
    costs = EngineStepCosts(other, made_profile(tmp_path))
    load = StepLoad([200, 40], [Chunk(0, 62, samples=True)])
    rows, layer = 64, other.layers[0]
    products = sum(product_us(m.rows * m.cols, rows) for m in layer.products)
    keys = [200.0, 40.0, 31.5 + 32]
    kv = sum(keys) + keys[2] * (62 * 4 / 96 - 1)
    ops = (keys[0] + keys[1] + 62 * keys[2]) * 8 * 128
    attention = 3 * made.CALL_US + made.KV_US * kv * 2 * 128 + made.OP_US * ops
    wanted = products + attention + made.AROUND_ATTENTION_US
    assert costs.layer_work(0, load).us == pytest.approx(wanted, rel=0.01)
    head = product_us(other.head.rows * other.head.cols, 3)
    once = made.ONCE_US + 3 * made.SEQUENCE_US + rows * made.ROW_ONCE_US + head
    assert costs.step_work(load).us == pytest.approx(once + made.SAMPLE_US * 3 * 512, rel=0.01)
    colder = EngineStepCosts(other, made_profile(tmp_path), over_disk=True)
    more_us = (made.COLDER - 1) * (once - head)
    assert colder.step_work(load).us - costs.step_work(load).us == pytest.approx(more_us, rel=0.01)
    more_us = (made.COLDER - 1) * made.AROUND_ATTENTION_US
    found_us = colder.layer_work(0, load).us - costs.layer_work(0, load).us
    assert found_us == pytest.approx(more_us, rel=0.05)
    one = 3 * 512 * 192
    experts = costs.expert_costs(0)
    assert experts.cpu_start_us + experts.cpu[1] + experts.cpu[4] == pytest.approx(
        made.START_US + product_us(one, 1) + product_us(one, 4), rel=0.01
    )


def test_products_per_head_have_their_own_curve(tmp_path: Path, other: ModelShape) -> None:
    profile, rows = made_profile(tmp_path), 4
    plain = replace(other.layers[0].products[0], form="bfloat16")
    per_head = replace(plain, per_head=True)
    ours = profile.cpu.product_curves[made.FORMS.index("bfloat16")]
    slow = [structs.replace(figure, value=3 * figure.value) for figure in ours.ps]
    heads = structs.replace(ours, weights=f"bfloat16 {PER_HEAD}", ps=slow)
    cpu = structs.replace(profile.cpu, product_curves=[*profile.cpu.product_curves, heads])
    products = Products(structs.replace(profile, cpu=cpu))
    assert products.us(per_head, rows) == pytest.approx(3 * products.us(plain, rows))
    one_thread = Products(structs.replace(profile, cpu=cpu), 1)
    assert one_thread.us(per_head, rows) == products.us(per_head, rows), "torch's has but one"
    assert Products(profile).us(per_head, rows) == products.us(plain, rows), "not calibrated"


def test_fewer_threads_read_and_multiply_slower(tmp_path: Path, other: ModelShape) -> None:
    profile = made_profile(tmp_path)
    all_, half = (EngineStepCosts(other, profile, count) for count in (2, 1))
    for rows in (1, 64, 512):
        assert half.expert_costs(0).cpu[rows] == pytest.approx(2 * all_.expert_costs(0).cpu[rows])


def test_faster_products_leave_what_the_engine_adds(tmp_path: Path, other: ModelShape) -> None:
    profile = made_profile(tmp_path)
    curves = [
        structs.replace(c, ps=[structs.replace(f, value=f.value / 2) for f in c.ps])
        for c in profile.cpu.product_curves
    ]
    fast = on_other_cpu(profile, structs.replace(profile.cpu, product_curves=curves))
    before, after = (EngineStepCosts(other, p).engine for p in (profile, fast))
    for one, other_one in (
        (after.resident, before.resident),
        (after.over_disk, before.over_disk),
    ):
        assert one.once == pytest.approx(other_one.once, rel=1e-6)
        assert one.around_attention == pytest.approx(other_one.around_attention, rel=1e-6, abs=1e-9)
    assert after.around_experts == pytest.approx(before.around_experts, rel=1e-6, abs=1e-9)


def test_a_profile_without_steps_adds_nothing(tmp_path: Path, other: ModelShape) -> None:
    costs = EngineStepCosts(other, made_profile(tmp_path, with_steps=False))
    assert not costs.is_measured
    work = costs.layer_work(0, StepLoad([1000]))
    products = sum(product_us(m.rows * m.cols, 1) for m in other.layers[0].products)
    assert work.us == pytest.approx(products + 1000 * 2 * 128 * 2 / 2e10 * 1e6)
    assert not work.used.get(Resource.OVERHEAD)


def test_costs_are_never_negative() -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    for _ in range(50):
        features = rng.random((12, 4))
        us = features @ (rng.standard_normal(4)) + 0.1 * rng.random(12)
        costs = fit_costs(features.tolist(), us.tolist())
        assert (costs >= 0).all(), f"seed {seed}"
    wanted = np.array([3.0, 0.0, 2.0, 0.5])
    features = rng.random((12, 4))
    assert fit_costs(features.tolist(), (features @ wanted).tolist()) == pytest.approx(
        wanted, abs=1e-6
    )
