"""One MoE layer alone: which experts each call uses, and how a call is timed.

Calls walk through all experts in a shuffled order, so that one-row calls never find weights in the
processor's caches: an expert comes again after all others. Imports torch alone: the runners of
other venvs use it too.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CALLS = 24


@dataclass(frozen=True)
class LayerShape:
    hidden_size: int = 2048
    intermediate_size: int = 768
    num_experts: int = 128
    top_k: int = 8


@dataclass(frozen=True)
class Experts:
    """ids [T, K] int64, no expert twice in a row; weights [T, K] float32 that sum to one."""

    ids: Tensor
    weights: Tensor


Call = Callable[[int, Tensor, Experts], Tensor]


def time_layer(
    call: Call,
    shape: LayerShape,
    num_layers: int,
    num_rows: int,
    dtype: torch.dtype,
    calls: int = CALLS,
) -> float:
    """Median milliseconds of call(layer, x [T, H], experts), on routings that differ."""
    draw = torch.Generator().manual_seed(num_rows)
    choices = routings(shape, num_layers, num_rows)
    times_s = []
    for number in range(calls + 2):
        layer, experts = next(choices)
        x = torch.randn(num_rows, shape.hidden_size, generator=draw).to(dtype)
        started_s = time.perf_counter()
        call(layer, x, experts)
        if number >= 2:  # the first calls set up threads and kernels
            times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s) * 1e3


def routings(shape: LayerShape, num_layers: int, num_rows: int) -> Iterator[tuple[int, Experts]]:
    """Layers in turn. The rows of a call take different, uniformly random experts."""
    draw = random.Random(shape.num_experts)
    orders = [draw.sample(range(shape.num_experts), shape.num_experts) for _ in range(num_layers)]
    positions = [0] * num_layers
    while True:
        for layer in range(num_layers):
            rows = []
            if num_rows == 1:
                start = positions[layer]
                rows = [
                    [orders[layer][(start + k) % shape.num_experts] for k in range(shape.top_k)]
                ]
                positions[layer] += shape.top_k
            else:
                rows = [draw.sample(range(shape.num_experts), shape.top_k) for _ in range(num_rows)]
            weights = torch.full((num_rows, shape.top_k), 1.0 / shape.top_k)
            yield layer, Experts(torch.tensor(rows), weights)


@dataclass(frozen=True)
class LayerWeights:
    """gate_up: [E, 2I, H], gate rows first. down: [E, H, I]."""

    gate_up: Tensor
    down: Tensor


def random_layer(shape: LayerShape, dtype: torch.dtype, seed: int = 0) -> LayerWeights:
    draw = torch.Generator().manual_seed(seed)
    experts, hidden, inner = shape.num_experts, shape.hidden_size, shape.intermediate_size

    def tensor(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype).normal_(0.0, 0.02, generator=draw)

    return LayerWeights(tensor(experts, 2 * inner, hidden), tensor(experts, hidden, inner))


def linear_loop(weights: LayerWeights, x: Tensor, experts: Experts) -> Tensor:
    """The plain way: a loop over the chosen experts, F.linear on the rows of each. [T, H]."""
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert in experts.ids.unique().tolist():
        row, choice = torch.where(experts.ids == expert)
        gate, up = F.linear(x[row], weights.gate_up[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, weights.down[expert]).float()
        total.index_add_(0, row, out * experts.weights[row, choice, None])
    return total


def relative_error(call: Call, weights: LayerWeights, shape: LayerShape) -> float:
    """Of `call` against the loop, on 16 rows: more than bf16 rounding means wrong arithmetic."""
    x = torch.randn(16, shape.hidden_size, generator=torch.Generator().manual_seed(7))
    x = x.to(weights.down.dtype)
    layer, experts = next(routings(shape, 1, 16))
    expected = linear_loop(weights, x, experts)
    found = call(layer, x, experts).float()
    return float((found - expected).norm() / expected.norm())
