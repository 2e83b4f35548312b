"""Experts of one layer as torch computes them on a device, from packed records in its slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import Routing
from moeserve.cpu_backend.activations import gated_activation
from moeserve.cpu_backend.grouping import weighted_sum
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.experts.device.packed_tensors import Unpacked, matrices_of

#: unpacked weights that stand on the device at a time, beyond one expert's
UNPACKED_BYTES = 256 << 20


class TorchExperts:
    """The arithmetic of a layer's experts, several at a time.

    Weights are unpacked to the dtype of the rows, products are taken in it, and everything between
    them in float32. A row's bits may depend on how many rows its expert has: as torch's products
    on that device have it.
    """

    def __init__(self, experts: PackedExperts) -> None:
        spec = experts.spec
        self.record_bytes = experts.record_bytes
        self._gate_up, self._down = matrices_of(experts)
        self._activation = gated_activation(spec)
        self._bias_bytes: tuple[slice, slice] | None = None
        if spec.bias:
            first, second = experts.native.gate_up_bias_offset, experts.native.down_bias_offset
            self._bias_bytes = (
                slice(first, first + 4 * experts.gate_up_layout.rows),
                slice(second, second + 4 * spec.hidden_size),
            )
        self._num_weights = 3 * spec.hidden_size * spec.intermediate_size

    def most_at_a_time(self, dtype: torch.dtype) -> int:
        """Experts whose unpacked weights may stand beside each other."""
        return max(1, UNPACKED_BYTES // (self._num_weights * dtype.itemsize))

    def run(self, rows: Tensor, records: Tensor) -> Tensor:
        """rows [n, M, H], M of each of n experts; records [n, bytes]. Returns [n, M, H] float32."""
        dtype = rows.dtype
        biases = (None, None) if self._bias_bytes is None else self._biases(records)
        hidden = _product(rows, self._gate_up.unpack(records, dtype), biases[0])
        inner = self._activation(hidden).to(dtype)
        return _product(inner, self._down.unpack(records, dtype), biases[1])

    def _biases(self, records: Tensor) -> tuple[Tensor, Tensor]:
        assert self._bias_bytes is not None
        gate_up, down = (records[:, part].view(torch.float32) for part in self._bias_bytes)
        return self._gate_up.vectors(gate_up), down


def _product(rows: Tensor, weights: Unpacked, bias: Tensor | None) -> Tensor:
    """rows [n, M, K] times weights [n, N, K], plus bias [n, N]: [n, M, N] float32."""
    out = torch.bmm(rows, weights.values.transpose(1, 2)).float()
    if weights.scales is not None:
        out *= weights.scales.unsqueeze(1)
    if bias is not None:
        out += bias.unsqueeze(1)
    return out


class PairRows:
    """Which rows of a batch chose which expert, as index tensors of a device.

    Pair t * K + k is row t's k-th choice. Built on the host, where the routing is.
    """

    def __init__(self, routing: Routing, num_experts: int) -> None:
        """routing: ids [T, K] on the CPU."""
        ids = routing.ids.numpy().ravel()
        self.num_pairs = len(ids)
        self.top_k = routing.ids.shape[1]
        self.counts: NDArray[np.int64] = np.bincount(ids, minlength=num_experts)
        self._pairs: NDArray[np.int64] = np.argsort(ids, kind="stable")
        self._starts = np.concatenate(([0], np.cumsum(self.counts)))

    def batches(self, experts: Sequence[int], most: int) -> Iterator[tuple[list[int], Tensor]]:
        """Experts with as many rows as each other, nearly, and their pairs [n, M]; what an expert
        has fewer of is num_pairs. most: experts in a batch. Those that no row chose are left out.
        """
        chosen = sorted((e for e in experts if self.counts[e]), key=lambda e: -self.counts[e])
        for first in range(0, len(chosen), most):
            batch = chosen[first : first + most]
            pairs = np.full((len(batch), int(self.counts[batch[0]])), self.num_pairs, np.int64)
            for place, expert in enumerate(batch):
                start, stop = self._starts[expert], self._starts[expert + 1]
                pairs[place, : stop - start] = self._pairs[start:stop]
            yield batch, torch.from_numpy(pairs)


class PairSums:
    """What each choice of a row gave, until all are there; the same sums whatever the order in
    which experts were computed."""

    def __init__(self, x: Tensor, routing: Routing, num_experts: int) -> None:
        """x: [T, H] on the device. routing: on the CPU."""
        self.rows = PairRows(routing, num_experts)
        self.dtype = x.dtype
        self._x = x
        self._weights = routing.weights.to(x.device, non_blocking=True)
        # The last row takes what stands in for rows that an expert has fewer of than others.
        shape = (self.rows.num_pairs + 1, x.shape[1])
        self._pairs = torch.zeros(shape, dtype=torch.float32, device=x.device)

    def add(self, layer: TorchExperts, pairs: Tensor, records: Tensor) -> None:
        """Computes one of `rows.batches`. records: [n, bytes] of its experts."""
        pairs = pairs.to(self._x.device, non_blocking=True)
        tokens = pairs.clamp(max=self.rows.num_pairs - 1).div(
            self.rows.top_k, rounding_mode="floor"
        )
        out = layer.run(self._x[tokens], records)
        self._pairs.index_copy_(0, pairs.flatten(), out.flatten(0, 1))

    def total(self) -> Tensor:
        """[T, H] float32: the weighted sums; a choice that was not computed adds nothing."""
        pairs = self._pairs[:-1].view(*self._weights.shape, -1)
        return weighted_sum(pairs, self._weights.float())
