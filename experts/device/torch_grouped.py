"""Experts of one layer on one device, through plain torch: a grouped GEMM, or a loop of GEMMs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeserve.cache.expert_cache import LayerSlots
from moeserve.core import ExpertSpec, ExpertWeights, Routing
from moeserve.cpu_backend.activations import gated_activation
from moeserve.cpu_backend.grouping import group_pairs, weighted_sum
from moeserve.cpu_backend.linear import linear

GroupedMm = Callable[..., Tensor]


def find_grouped_mm(weights: ExpertWeights) -> GroupedMm | None:
    """torch's grouped GEMM where it takes these weights, else None.

    It needs bfloat16, rows of a multiple of 16 bytes and, on CUDA, compute capability 8.0.
    """
    # Public since torch 2.10, the same function under a private name before.
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
    grouped_mm = grouped_mm or getattr(torch, "_grouped_mm", None)
    _, hidden_size, intermediate_size = weights.down.shape
    fits = weights.down.dtype is torch.bfloat16 and hidden_size % 8 == intermediate_size % 8 == 0
    device = weights.down.device
    if device.type == "cuda":
        fits = fits and torch.cuda.get_device_capability(device) >= (8, 0)
    return grouped_mm if fits else None


class GroupedExperts:
    """The experts in slots `first_slot` and up of the device tier; slot s is row s - first_slot.

    The grouped path never waits for the device; the loop reads the ids back once per call.
    """

    def __init__(self, spec: ExpertSpec, pool: ExpertWeights, first_slot: int) -> None:
        """pool: the slots' weights, [S, 2I, H] and [S, H, I], on the device."""
        self._pool = pool
        self._first_slot = first_slot
        self._activation = gated_activation(spec)
        self._grouped_mm = find_grouped_mm(pool)
        self._rows_version = -1
        self._rows = torch.empty(0, dtype=torch.int64)

    def run(
        self,
        x: Tensor,
        routing: Routing,
        slots: LayerSlots,
        experts: tuple[int, ...] | None = None,
    ) -> Tensor:
        """x [T, H] to the weighted sums over `experts` (None: all), [T, H] float32."""
        num_tokens, top_k = routing.ids.shape
        grouped_mm = self._grouped_mm
        if experts is None and grouped_mm is not None:
            pair_out = self._run_grouped(x, self._pool_rows(slots)[routing.ids], grouped_mm)
        else:
            pair_out = self._run_loop(x, routing.ids, slots, experts)
        return weighted_sum(pair_out.view(num_tokens, top_k, -1), routing.weights)

    def _pool_rows(self, slots: LayerSlots) -> Tensor:
        """[E] int64 on the device: the pool row of each expert. Copied there once per version."""
        if self._rows_version != slots.version:
            rows = torch.tensor(slots.slots, dtype=torch.int64) - self._first_slot
            self._rows = rows.to(self._pool.down.device)
            self._rows_version = slots.version
        return self._rows

    def _run_grouped(self, x: Tensor, pool_rows: Tensor, grouped_mm: GroupedMm) -> Tensor:
        """pool_rows: [T, K]. Returns [T*K, H], one row per pair."""
        pool = self._pool
        num_slots, top_k = pool.down.shape[0], pool_rows.shape[1]
        sorted_rows, order = pool_rows.flatten().sort(stable=True)  # [T*K]
        slot_numbers = torch.arange(num_slots, device=x.device)
        ends = torch.searchsorted(sorted_rows, slot_numbers, right=True, out_int32=True)  # [S]
        rows = x[order.div(top_k, rounding_mode="floor")]  # [T*K, H]
        gate_up = grouped_mm(rows, pool.gate_up.transpose(-2, -1), offs=ends)
        if pool.gate_up_bias is not None:
            gate_up += pool.gate_up_bias[sorted_rows]
        out = grouped_mm(self._activation(gate_up), pool.down.transpose(-2, -1), offs=ends)
        if pool.down_bias is not None:
            out += pool.down_bias[sorted_rows]
        return torch.empty_like(out).index_copy_(0, order, out)

    def _run_loop(
        self, x: Tensor, ids: Tensor, slots: LayerSlots, experts: tuple[int, ...] | None
    ) -> Tensor:
        pool, top_k = self._pool, ids.shape[1]
        pair_out = x.new_zeros((ids.numel(), x.shape[1]))  # [T*K, H]
        gate_up_bias, down_bias = pool.gate_up_bias, pool.down_bias
        for expert, pairs in group_pairs(ids, experts):
            row = slots.slots[expert] - self._first_slot
            rows = x[pairs.div(top_k, rounding_mode="floor")]  # [M, H]
            bias = None if gate_up_bias is None else gate_up_bias[row]
            hidden = self._activation(linear(rows, pool.gate_up[row], bias))  # [M, I]
            bias = None if down_bias is None else down_bias[row]
            pair_out.index_copy_(0, pairs, linear(hidden, pool.down[row], bias))
        return pair_out
