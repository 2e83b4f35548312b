"""Experts on the CPU through torch: the portable backend, and the reference of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.core import ExpertSpec, ExpertWeights, ModelError
from moeserve.cpu_backend.activations import gated_activation
from moeserve.cpu_backend.backend import Demands, ExpertJob
from moeserve.cpu_backend.grouping import run_grouped, weighted_sum
from moeserve.cpu_backend.linear import linear
from moeserve.cpu_backend.one_thread import OneThreadBackend
from moeserve.cpu_backend.packing import PackedExperts


@dataclass(frozen=True)
class Expert:
    """Views into the layer's tensors, made once: slicing per step costs more than a small GEMM."""

    gate_up: Tensor  # [2I, H]
    down: Tensor  # [H, I]
    gate_up_bias: Tensor | None  # [2I]
    down_bias: Tensor | None  # [H]


@dataclass(frozen=True)
class Layer:
    spec: ExpertSpec
    activation: Callable[[Tensor], Tensor]
    experts: tuple[Expert, ...]

    def run_expert(self, expert_id: int, rows: Tensor) -> Tensor:
        """rows: [M, H], M at least 1. Returns [M, H]."""
        expert = self.experts[expert_id]
        num_rows = rows.shape[0]
        if num_rows == 1:  # doubled here once, or `linear` would do it twice
            rows = torch.cat((rows, rows))
        hidden = self.activation(linear(rows, expert.gate_up, expert.gate_up_bias))  # [M, I]
        return linear(hidden, expert.down, expert.down_bias)[:num_rows]


class TorchBackend(OneThreadBackend):
    """A row's result depends on that row alone where `is_row_invariant` holds and the intermediate
    size is a multiple of 32; otherwise the last bit of an activation may depend on its place in the
    batch, and with several torch threads so it may where a row falls on the border between two.
    """

    name = "torch"

    def __init__(self) -> None:
        super().__init__()
        self._layers: dict[int, Layer] = {}

    @classmethod
    def lacks(cls, demands: Demands) -> str | None:
        return (
            "it reads plain tensors, not packed or quantised weights" if demands.quantized else None
        )

    def add_layer(
        self, layer: int, spec: ExpertSpec, weights: ExpertWeights | PackedExperts
    ) -> None:
        assert isinstance(weights, ExpertWeights), "weights are packed for the native backend only"
        if layer in self._layers:
            raise ModelError(f"layer {layer}: its experts were added before")
        self._layers[layer] = Layer(spec, gated_activation(spec), _split(weights))

    @torch.inference_mode()
    def run(self, job: ExpertJob) -> Tensor:
        layer = self._layers[job.layer]
        pair_out = run_grouped(job.x, job.routing.ids, job.experts, layer.run_expert)
        return weighted_sum(pair_out, job.routing.weights).to(job.out_dtype)


def _split(weights: ExpertWeights) -> tuple[Expert, ...]:
    num_experts = weights.gate_up.shape[0]
    absent: tuple[None, ...] = (None,) * num_experts
    return tuple(
        Expert(*tensors)
        for tensors in zip(
            weights.gate_up.unbind(),
            weights.down.unbind(),
            absent if weights.gate_up_bias is None else weights.gate_up_bias.unbind(),
            absent if weights.down_bias is None else weights.down_bias.unbind(),
            strict=True,
        )
    )
