"""Random experts for tests of the native backend, packed, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from support.native_matrices import (
    Kind,
    allocate,
    has_bf16_products,
    quantised_rows,
    random_codes,
    runtime,
    unpack,
    usable_cols,
)
from torch import Tensor

from moeserve.core import ExpertSpec, ExpertWeights, Routing
from moeserve.cpu_backend import _native as native
from moeserve.cpu_backend.activations import gated_activation
from moeserve.experts.reference import reference_experts

PANEL = 16
#: numbers of `Activation` in kernels.h, by the names of config.json
ACTIVATIONS = {
    "silu": 0,
    "gelu": 1,
    "gelu_pytorch_tanh": 2,
    "quick_gelu": 3,
    "relu": 4,
    "swiglu_clamped": 5,
}


def interleaved_rows(inner: int) -> tuple[Tensor, Tensor]:
    """The packed rows of gate's outputs and of up's: panels of 16 by turns."""
    gate = torch.arange(inner) // PANEL * (2 * PANEL) + torch.arange(inner) % PANEL
    return gate, gate + PANEL


def pack_into(
    kind: Kind, layout: native.Layout, data: Tensor, row_ids: Tensor, generator: torch.Generator
) -> None:
    """Random rows, small enough for activations of about 1."""
    count = row_ids.numel()
    if kind.is_codes:
        codes, scales = random_codes(kind, count, layout.cols, generator)
        scales = scales - 4 if scales.dtype is torch.uint8 else scales / 16
        assert native.pack_codes(runtime("scalar"), layout, data, row_ids, codes, scales)
        return
    weight = torch.randn(count, layout.cols, generator=generator) / layout.cols**0.5
    assert native.pack(runtime("scalar"), layout, data, row_ids, weight)


@dataclass(frozen=True)
class Layer:
    """Packed experts, and their weights as the packed ones stand for, in float64."""

    kind: Kind
    spec: ExpertSpec
    native: native.PackedExperts
    weights: ExpertWeights

    def run(
        self,
        isa: str,
        x: Tensor,
        routing: Routing,
        wanted: Tensor | None = None,
        num_threads: int = 1,
    ) -> Tensor:
        out = torch.full((x.shape[0], self.spec.hidden_size), torch.nan)
        ids, factors = routing.ids, routing.weights
        self.native.run(runtime(isa, num_threads), x, ids, factors, wanted, out)
        return out

    def expected(self, isa: str, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """The result in float64 and a bound of the kernels' distance from it, both [T, H]."""
        exact = not self.kind.quantises_rows and not (
            self.kind.name == "bf16" and has_bf16_products(isa)
        )
        y, bound = self._rounded(isa, x.double(), routing)
        if exact:
            torch.testing.assert_close(
                y, reference_experts(self.spec, self.weights, x.double(), routing)
            )
        return y, bound

    def _as_used(self, isa: str, rows: Tensor) -> tuple[Tensor, float]:
        """rows [T, K] as the kernels multiply them, and how far apart two neighbours are."""
        if self.kind.quantises_rows:
            return quantised_rows(rows), rows.abs().max().item() / 127
        if self.kind.name == "bf16" and has_bf16_products(isa):
            return rows.float().bfloat16().double(), rows.abs().max().item() * 2.0**-8
        return rows, 0.0

    def _rounded(self, isa: str, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """reference_experts with the rows of both products rounded as the kernels round them.

        The bound: float32 sums, relative to the sums of magnitudes; and where the hidden state is
        rounded, a few of its numbers that lie next to a tie and so end one step away.
        """
        activation = gated_activation(self.spec)
        weights, inputs = self.weights, self._as_used(isa, x)[0]
        y, bound = torch.zeros_like(x), torch.zeros_like(x)
        for token in range(x.shape[0]):
            for expert, factor in zip(routing.ids[token], routing.weights[token], strict=True):
                gate_up = weights.gate_up[expert] @ inputs[token]
                if weights.gate_up_bias is not None:
                    gate_up = gate_up + weights.gate_up_bias[expert]
                hidden, step = self._as_used(isa, activation(gate_up).unsqueeze(0))
                down = weights.down[expert]
                out, magnitude = down @ hidden[0], down.abs() @ hidden[0].abs()
                if weights.down_bias is not None:
                    out = out + weights.down_bias[expert]
                    magnitude = magnitude + weights.down_bias[expert].abs()
                inexact = 1e-5 * (magnitude + down.abs().sum(dim=1) * 0.1)
                inexact += 3 * step * down.abs().amax(dim=1)
                y[token] += factor.double() * out
                bound[token] += factor.double().abs() * inexact
        return y, bound


def pack_layer(kind: Kind, spec: ExpertSpec, generator: torch.Generator) -> Layer:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    if usable_cols(kind, hidden) != hidden or usable_cols(kind, inner) != inner:
        raise ValueError(f"{kind.name} does not take {hidden} and {inner} inputs")
    panels = -(-inner // PANEL)
    gate_up, down = kind.layout(2 * panels * PANEL, hidden), kind.layout(hidden, inner)
    packed = native.PackedExperts(
        gate_up, down, spec.bias, ACTIVATIONS[spec.activation],
        spec.swiglu_alpha, spec.swiglu_limit, spec.num_experts,
    )  # fmt: skip
    gate_ids, up_ids = interleaved_rows(inner)
    row_ids = torch.cat((gate_ids, up_ids))
    dense: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for expert in range(spec.num_experts):
        record = allocate(packed.record_bytes)
        first = record[: gate_up.num_bytes]
        second = record[packed.down_offset : packed.down_offset + down.num_bytes]
        pack_into(kind, gate_up, first, row_ids, generator)
        pack_into(kind, down, second, torch.arange(hidden), generator)
        gate_up_bias = torch.randn(2 * inner, generator=generator) / 4
        down_bias = torch.randn(hidden, generator=generator) / 4
        if spec.bias:
            floats = record.view(torch.float32)
            floats[packed.gate_up_bias_offset // 4 + row_ids] = gate_up_bias
            floats[packed.down_bias_offset // 4 + torch.arange(hidden)] = down_bias
        packed.set_record(expert, record)
        unpacked = unpack(gate_up, first)[row_ids], unpack(down, second)
        dense.append((*unpacked, gate_up_bias, down_bias))
    stacked = [torch.stack(tensors).double() for tensors in zip(*dense, strict=True)]
    biases = stacked[2:] if spec.bias else (None, None)
    return Layer(kind, spec, packed, ExpertWeights(stacked[0], stacked[1], *biases))


def random_routing(
    num_tokens: int, spec: ExpertSpec, top_k: int, generator: torch.Generator
) -> Routing:
    """Distinct experts for every token, with positive weights."""
    scores = torch.rand(num_tokens, spec.num_experts, generator=generator)
    weights, ids = scores.topk(top_k)
    return Routing(ids, weights)
