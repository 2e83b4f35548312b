"""What is replayed: recorded routing, the shape that it comes from, and what that shape costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.routing_trace import Request, RoutingTrace, load_trace
from moeserve.core import ExpertKey, ExpertSpec
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.experts.device_tier import read_on_device_us, rest_of_layer_us
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.profile import Profile
from moeserve.planner.ablation import popularity


@dataclass(frozen=True)
class Shape:
    """A model as far as its times depend on it. In bfloat16 every token reads, besides routed
    experts, dense_bytes of a layer: attention and the router; shared_bytes of a layer: shared
    experts; outside_bytes once: the head, and layers without experts."""

    name: str
    file: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    form: PackFormat
    dense_bytes: int
    shared_bytes: int
    outside_bytes: int


#: of the experts, that have slots
SHARES = (0.25, 0.5, 0.75)
#: random orders of requests that are compared
ORDERS = 300
DEEPSEEK_ATTENTION_BYTES = 2 * (2048 * (16 * 192 + 576 + 16 * 128) + 512 * 16 * 256)
SHAPES = (
    Shape(
        "GPT-OSS-20B",
        "gptoss20b_decode.npz",
        num_experts=32,
        hidden_size=2880,
        intermediate_size=2880,
        form=PackFormat("mxfp4"),
        dense_bytes=2 * 2880 * (64 * 64 + 2 * 8 * 64 + 64 * 64 + 32),
        shared_bytes=0,
        outside_bytes=2 * 2880 * 201088,
    ),
    Shape(
        "DeepSeek-V2-Lite",
        "deepseekv2lite_prefill.npz",
        num_experts=64,
        hidden_size=2048,
        intermediate_size=1408,
        form=PackFormat("bfloat16"),
        dense_bytes=DEEPSEEK_ATTENTION_BYTES + 2 * 2048 * 64,
        shared_bytes=2 * 3 * 2048 * 2 * 1408,
        outside_bytes=DEEPSEEK_ATTENTION_BYTES + 2 * 2048 * (3 * 10944 + 102400),
    ),
)


@dataclass(frozen=True)
class Case:
    """others: tokens of requests that were counted for popularity; learn: those of them that the
    machinery has seen before. test: tokens of other requests, which are timed, request after
    request. rest_us: of a layer, all but its experts. outside_us: of a token, what is in no
    layer of experts; it is not timed. popular: experts by the uses that were counted. static_hits:
    of those placed by popularity, over all requests for the test, by SHARES."""

    shape: Shape
    trace: RoutingTrace
    others: NDArray[np.int64]
    learn: NDArray[np.int64]
    test: NDArray[np.int64]
    costs: CostModel
    rest_us: float
    outside_us: float
    popular: Sequence[ExpertKey]
    static_hits: Sequence[float]


def load_case(shape: Shape, folder: Path, profile: Profile, num_learn: int, num_test: int) -> Case:
    """Requests are dealt out by turns: every third one is for the test. Popularity is counted over
    all others: over a few of them a placement would be worse than static placement is."""
    trace = load_trace(folder / shape.file, shape.num_experts)
    test = [r for i, r in enumerate(trace.requests) if i % 3 == 0]
    learn = [r for i, r in enumerate(trace.requests) if i % 3]
    spec = ExpertSpec(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
    )
    record_bytes = PackedExperts.bytes_of_record(spec, shape.form, shape.form)
    costs = CostModel.of(profile, spec, shape.form.describe(), record_bytes)
    others = _tokens(learn)
    popular = popularity(trace.ids[others], shape.num_experts)
    ordered = _typical_first(test, static_hits(trace, _tokens(test), popular))
    return Case(
        shape,
        trace,
        others,
        _tokens(learn[:: max(1, round(len(others) / num_learn))])[:num_learn],
        _tokens(ordered)[:num_test],
        replace(costs, shared_us=read_on_device_us(profile, shape.shared_bytes)),
        rest_of_layer_us(profile, shape.dense_bytes),
        rest_of_layer_us(profile, shape.outside_bytes),
        popular,
        static_hits(trace, _tokens(test), popular).mean(0).tolist(),
    )


def static_hits(
    trace: RoutingTrace, tokens: NDArray[np.int64], popular: Sequence[ExpertKey]
) -> NDArray[np.float64]:
    """[T, len(SHARES)]: of each token's experts, those on the device if the popular ones are."""
    num_layers = trace.ids.shape[1]
    rank = np.empty((num_layers, trace.num_experts), np.int64)
    for place, key in enumerate(popular):
        rank[key] = place
    ranks = rank[np.arange(num_layers)[:, None], trace.ids[tokens]]  # [T, L, K]
    limits = [round(share * rank.size) for share in SHARES]
    return np.stack([(ranks < limit).mean((1, 2)) for limit in limits], axis=1)


def _typical_first(requests: Sequence[Request], hits: NDArray[np.float64]) -> list[Request]:
    """The requests in an order whose first ones are like all of them: of many random orders the one
    in which static placement, counted over any number of requests from the first one on, hits as
    over all. Requests differ, so a run over a few would otherwise tell of these.

    hits: of every token of the requests, one after the other.
    """
    lengths = np.array([request.length for request in requests])
    starts = np.cumsum(lengths) - lengths
    of_request = np.add.reduceat(hits, starts)  # [R, len(SHARES)]
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(requests)) for _ in range(ORDERS)]

    def distance(order: NDArray[np.int64]) -> float:
        so_far = of_request[order].cumsum(0) / lengths[order].cumsum()[:, None]
        return float(np.abs(so_far - so_far[-1]).mean())

    return [requests[i] for i in min(orders, key=distance)]


def _tokens(requests: Sequence[Request]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(r.start, r.start + r.length) for r in requests])
