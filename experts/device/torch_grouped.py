"""Experts of one layer on one device, through plain torch: a grouped GEMM, or a loop of GEMMs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moeserve.cache.expert_cache import LayerSlots
from moeserve.core import ExpertSpec, ExpertWeights, Routing
from moeserve.cpu_backend.activations import gated_activation
from moeserve.cpu_backend.grouping import run_grouped, weighted_sum
from moeserve.cpu_backend.linear import linear

GroupedMm = Callable[..., Tensor]


def find_grouped_mm(weights: ExpertWeights) -> GroupedMm | None:
    """torch's grouped GEMM where it takes these weights, else None.

    It needs bfloat16, rows of a multiple of 16 bytes and, on CUDA, compute capability 8.0.
    """
    # Public since torch 2.10. What 2.8 and 2.9 have under a private name takes fewer devices.
    grouped_mm: GroupedMm | None = getattr(torch.nn.functional, "grouped_mm", None)
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
        grouped_mm = self._grouped_mm
        if experts is None and grouped_mm is not None:
            pair_out = self._run_grouped(x, self._pool_rows(slots)[routing.ids], grouped_mm)
        else:
            run_expert = partial(self._run_expert, slots)
            pair_out = run_grouped(x, routing.ids, experts, run_expert)
        return weighted_sum(pair_out, routing.weights)

    def _pool_rows(self, slots: LayerSlots) -> Tensor:
        """[E] int64 on the device: the pool row of each expert. Copied there once per version."""
        if self._rows_version != slots.version:
            rows = torch.tensor(slots.slots, dtype=torch.int64) - self._first_slot
            self._rows = rows.to(self._pool.down.device)
            self._rows_version = slots.version
        return self._rows

    def _run_grouped(self, x: Tensor, pool_rows: Tensor, grouped_mm: GroupedMm) -> Tensor:
        """pool_rows: [T, K]. Returns [T, K, H]."""
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
        return torch.empty_like(out).index_copy_(0, order, out).view(*pool_rows.shape, -1)

    def _run_expert(self, slots: LayerSlots, expert: int, rows: Tensor) -> Tensor:
        """rows: [M, H] to [M, H]."""
        pool, row = self._pool, slots.slots[expert] - self._first_slot
        gate_up_bias = None if pool.gate_up_bias is None else pool.gate_up_bias[row]
        down_bias = None if pool.down_bias is None else pool.down_bias[row]
        hidden = self._activation(linear(rows, pool.gate_up[row], gate_up_bias))  # [M, I]
        return linear(hidden, pool.down[row], down_bias)
