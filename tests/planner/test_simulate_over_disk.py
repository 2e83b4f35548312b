"""Stage 2 over the disk: against the cache's own replay, by hand, and what must hold of any run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from support import engine_profile as made
from support.engine_profile import product_us
from support.small_plans import TRAFFIC, deploy, model_trace, save

from moeserve.cache.policies.registry import build_policy
from moeserve.cache.replay import Rules, through_cache
from moeserve.cache.routing_trace import one_by_one
from moeserve.config import EngineConfig, ExpertConfig, ModelConfig
from moeserve.experts.schedule.profile import Profile
from moeserve.experts.schedule.profile_file import shipped_profile
from moeserve.planner.deployment import sized
from moeserve.planner.plan_types import (
    Estimate,
    PlanRequest,
    Resource,
    StepLoad,
    Traffic,
)
from moeserve.planner.shapes import ModelShape
from moeserve.planner.simulate.over_disk import DiskClock
from moeserve.planner.simulate.routing import recorded
from moeserve.planner.simulate.system import (
    make_clock,
    simulate,
    simulate_quickly,
)
from moeserve.planner.step_costs import EngineStepCosts


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


def test_reads_wait_for_what_is_computed_beside_them(shape: ModelShape, profile: Profile) -> None:
    """A first token, whose two experts in each of two layers are all to be read."""
    found = []
    for reads in ((1.0, 0.0), (1.25, 0.5)):
        costs = EngineStepCosts(shape, profile)
        tier = replace(costs.engine.tier, reads=np.array(reads))
        costs.engine = replace(costs.engine, tier=tier)
        deployment = deploy(shape, profile, host_slots=2)
        clock = DiskClock(costs, recorded(model_trace(), shape), 64, deployment)
        before_us = clock._reads.link.busy_us
        took_us = clock._step(np.asarray([0]), 0.0).us
        found.append((took_us, clock._reads.link.busy_us - before_us))
    (took, alone), (slower, beside) = found
    computed = 2 * 2 * product_us(3 * 256 * 128, 1)
    assert beside - alone == pytest.approx(0.25 * alone + 0.5 * computed, rel=0.02)
    assert slower > took + 0.9 * 0.25 * alone


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
