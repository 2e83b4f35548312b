"""The search never ends with worse than it began, and finds room where there is any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs
from support import engine_profile as made
from support.engine_profile import made_profile, read_config

from moeserve.cache.expert_cache import Tier
from moeserve.config import EngineConfig, ModelConfig, SchedulerConfig
from moeserve.core import ConfigError
from moeserve.planner.deployment import sized
from moeserve.planner.plan_types import PlanRequest, Traffic
from moeserve.planner.search import search
from moeserve.planner.simulate.system import simulate_quickly

CONFIG = {**made.CALIBRATED, "num_experts": 64, "num_hidden_layers": 8}


def request(tmp_path: Path, max_batch_tokens: int = 512) -> PlanRequest:
    return PlanRequest(
        engine=EngineConfig(
            model=ModelConfig(model=str(tmp_path)),
            scheduler=SchedulerConfig(max_batch_tokens=max_batch_tokens),
        ),
        traffic=Traffic(concurrency=2, prompt_tokens=60, output_tokens=4),
    )


def test_a_small_step_budget_is_raised_where_that_pays(tmp_path: Path) -> None:
    shape, profile = read_config(tmp_path, CONFIG), made_profile(tmp_path)
    asked = request(tmp_path, max_batch_tokens=8)
    kept = search(asked, profile, shape)
    assert kept.engine.scheduler.max_batch_tokens == 8, "what was asked for stays"
    found = search(asked, profile, shape, given=frozenset())
    before = simulate_quickly(sized(asked, profile, shape)).output_tokens_per_s.mid
    assert found.gain > 1.02
    assert found.estimate.output_tokens_per_s.mid == pytest.approx(found.gain * before)
    assert any(flag.startswith("--max-batch-tokens") for flag in found.flags)
    assert found.tried >= 4


def test_experts_go_to_disk_where_memory_is_short(tmp_path: Path) -> None:
    shape = replace(read_config(tmp_path, CONFIG), packed=True)
    profile = made_profile(tmp_path)
    asked = request(tmp_path)
    needed = sized(asked, profile, shape).memory.peak_bytes(Tier.HOST)
    kv_bytes = sum(
        part.num_bytes
        for part in sized(asked, profile, shape).memory.parts
        if part.name == "kv pool beyond them"
    )
    less = needed - kv_bytes - shape.expert_bytes // 8
    small = structs.replace(profile, cpu=structs.replace(profile.cpu, memory_bytes=int(less / 0.9)))
    # the rounding of slots to whole pages takes more than a mapped file does
    found = search(asked, small, shape)
    slots = found.engine.experts.host_slots
    assert slots is not None
    assert 2 <= slots < shape.num_experts
    memory = sized(replace(asked, engine=found.engine), small, shape).memory
    assert memory.peak_bytes(Tier.HOST) <= less
    tiny = structs.replace(profile, cpu=structs.replace(profile.cpu, memory_bytes=1 << 20))
    with pytest.raises(ConfigError, match="memory: no settings fit"):
        search(asked, tiny, shape)
