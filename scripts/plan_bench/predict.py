"""The same configuration as `moeserve plan` predicts it: from the machine's profile, in which the
disk may stand as it was beside the case."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from msgspec import structs

from moeserve.cache.expert_cache import Tier
from moeserve.experts.schedule.profile import DiskPoint, Figure, Profile
from moeserve.planner.deployment import sized
from moeserve.planner.lookup import find_shape
from moeserve.planner.plan_types import PlanRequest, Traffic
from moeserve.planner.simulate.system import simulate
from plan_bench.cases import OUTPUT_TOKENS, Case
from plan_bench.measure import engine_settings


def on_disk(profile: Profile, measured: list[dict[str, float]]) -> Profile:
    """The profile with the disk as it was beside a case, the mean of before and after. What the
    profile has of the disk stays where nothing is known."""
    rates: dict[tuple[float, float], list[float]] = defaultdict(list)
    for point in measured:
        rates[point["block"], point["depth"]].append(point["bytes_per_s"])
    points = [
        DiskPoint(
            block_bytes=int(block),
            queue_depth=int(depth),
            bytes_per_s=Figure(value=sum(found) / len(found)),
        )
        for (block, depth), found in rates.items()
    ]
    return structs.replace(profile, disk=points) if points else profile


def mean_of(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """Of what `predict` says from several profiles; what limits is that of the first."""
    numbers = [key for key, value in predictions[0].items() if isinstance(value, float | int)]
    means = {key: sum(each[key] for each in predictions) / len(predictions) for key in numbers}
    return predictions[0] | means


def predict(model: Path, trace: Path, case: Case, profile: Profile) -> dict[str, Any]:
    """model: packed; nothing of it is read but sizes. trace: routing of the model."""
    settings = engine_settings(model, case)
    request = PlanRequest(
        engine=settings,
        traffic=Traffic(
            concurrency=case.num_streams,
            prompt_tokens=case.context_tokens,
            output_tokens=OUTPUT_TOKENS,
        ),
        trace=trace,
    )
    deployment = sized(request, profile, find_shape(settings))
    estimate = simulate(deployment)
    assert estimate.tpot_s is not None, "of one output token there is none"
    speed = estimate.output_tokens_per_s
    return {
        "ttft_s": estimate.ttft_s.mid,
        "tpot_s": estimate.tpot_s.mid,
        "tokens_per_s": speed.mid,
        "low": speed.low,
        "high": speed.high,
        "hit_rate": 1.0 if estimate.hit_rate is None else estimate.hit_rate,
        "rss_bytes": deployment.memory.steady_bytes(Tier.HOST),
        "limits": {limit.phase: limit.resource.value for limit in estimate.limits},
    }
