"""A small model, and what it takes to plan it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from support import engine_profile as made
from support.routing_samples import topical_trace

from moeserve.cache.routing_trace import RoutingTrace
from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.experts.schedule.profile import Profile
from moeserve.planner.deployment import sized
from moeserve.planner.plan_types import (
    Deployment,
    PlanRequest,
    Traffic,
)
from moeserve.planner.shapes import ModelShape

CONFIG = {**made.CALIBRATED, "num_hidden_layers": 2, "num_experts": 16}
TRAFFIC = Traffic(concurrency=4, prompt_tokens=40, output_tokens=12)


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
