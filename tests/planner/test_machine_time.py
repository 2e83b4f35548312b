"""The shortest time in which CPU and device do a step's work together, against its closed form."""

from __future__ import annotations

import json

import pytest
from support.known_configs import MIXTRAL_8X7B
from support.randomness import fresh_generators

from moeserve.config import EngineConfig, ExpertConfig, ModelConfig
from moeserve.experts.schedule.profile_file import shipped_profile
from moeserve.planner.bound import Bound
from moeserve.planner.deployment import sized
from moeserve.planner.model_shape import read_shape
from moeserve.planner.plan_types import PlanRequest, Resource, Traffic
from moeserve.planner.work import Machine, Work


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    file = tmp_path_factory.mktemp("mixtral") / "config.json"
    file.write_text(json.dumps(MIXTRAL_8X7B))
    experts = ExpertConfig(device_slots=64)
    engine = EngineConfig(model=ModelConfig(device="emulated"), experts=experts)
    request = PlanRequest(
        engine=engine, traffic=Traffic(concurrency=1, prompt_tokens=512, output_tokens=128)
    )
    profile = shipped_profile("rtx4090-pcie4")
    return Bound(sized(request, profile, read_shape(engine.model, file)))._machine


def test_a_step_takes_as_long_as_the_tightest_of_its_limits(machine: Machine) -> None:
    """Each limit by itself: T such that what the CPU leaves in T takes the other one T."""
    rng, _ = fresh_generators()
    rates = machine.rates
    read, peak = rates.cpu_read, rates.cpu_peak(machine.form)
    device_read, device_peak = rates.device_read, rates.device_peak(machine.form)
    for _ in range(500):
        expert_bytes, expert_ops = 10 ** rng.uniform(6, 11), 10 ** rng.uniform(9, 14)
        work = Work(
            other_bytes=10 ** rng.uniform(6, 10),
            expert_bytes=expert_bytes,
            missing_bytes=rng.choice((0.0, rng.random(), 1.0)) * expert_bytes,
            ops=10 ** rng.uniform(9, 13),
            attention_ops=10 ** rng.uniform(7, 12),
            expert_ops=expert_ops,
        )
        scores_s = work.attention_ops / rates.device_peak(machine.dtype)
        every_ops = work.ops + expert_ops + scores_s * device_peak
        wanted_s = max(
            work.missing_bytes / (rates.link + read),
            work.other_bytes / device_read,
            (work.other_bytes + expert_bytes) / (device_read + read),
            work.ops / device_peak + scores_s,
            every_ops / (device_peak + peak),
        )
        times = machine.busy_s(work)
        assert max(times.values()) == pytest.approx(wanted_s, rel=1e-9)
        assert times[Resource.CPU_MEMORY] <= wanted_s * (1 + 1e-9)
