"""What is replayed: recorded routing, the shape that it comes from, and what that shape costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.routing_trace import Request, RoutingTrace, load_trace
from moeserve.core import ExpertSpec
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.experts.device_tier import rest_of_layer_us
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.profile import Profile


@dataclass(frozen=True)
class Shape:
    """A model as far as its times depend on it. dense_bytes: what every token reads of a layer
    besides routed experts, in bfloat16: attention, and the shared experts."""

    name: str
    file: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    form: PackFormat
    dense_bytes: int


SHAPES = (
    Shape(
        "GPT-OSS-20B",
        "gptoss20b_decode.npz",
        num_experts=32,
        hidden_size=2880,
        intermediate_size=2880,
        form=PackFormat("mxfp4"),
        dense_bytes=2 * 2880 * (64 * 64 + 2 * 8 * 64 + 64 * 64),
    ),
    Shape(
        "DeepSeek-V2-Lite",
        "deepseekv2lite_prefill.npz",
        num_experts=64,
        hidden_size=2048,
        intermediate_size=1408,
        form=PackFormat("bfloat16"),
        dense_bytes=2 * (2048 * (16 * 192 + 576 + 16 * 128) + 512 * 16 * 256 + 3 * 2048 * 2 * 1408),
    ),
)


@dataclass(frozen=True)
class Case:
    """learn: tokens of requests that the machinery has seen before. test: tokens of others, which
    are timed, request after request. rest_us: of a layer, all but its experts."""

    shape: Shape
    trace: RoutingTrace
    learn: NDArray[np.int64]
    test: NDArray[np.int64]
    costs: CostModel
    rest_us: float


def load_case(shape: Shape, folder: Path, profile: Profile, num_learn: int, num_test: int) -> Case:
    """Requests are dealt out by turns: every third one is for the test."""
    trace = load_trace(folder / shape.file, shape.num_experts)
    test = [r for i, r in enumerate(trace.requests) if i % 3 == 0]
    learn = [r for i, r in enumerate(trace.requests) if i % 3]
    spec = ExpertSpec(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
    )
    record_bytes = PackedExperts.bytes_of_record(spec, shape.form, shape.form)
    return Case(
        shape,
        trace,
        _tokens(learn, num_learn),
        _tokens(test, num_test),
        CostModel.of(profile, spec, shape.form.describe(), record_bytes),
        rest_of_layer_us(profile, shape.dense_bytes),
    )


def _tokens(requests: Sequence[Request], num_tokens: int) -> NDArray[np.int64]:
    """Whole requests that are spread over all of them; the last is cut to make it so many."""
    total = sum(r.length for r in requests)
    chosen = requests[:: max(1, round(total / num_tokens))]
    return np.concatenate([np.arange(r.start, r.start + r.length) for r in chosen])[:num_tokens]
