"""Gate lookahead after a learned, low-rank correction of the hidden state.

Between two gates the residual stream gains what the layer's experts give and what the next
attention brings. What an expert gives follows from the state, and is learnt as one small hidden
layer per expert, of which those of the chosen experts count. What attention brings is learnt from
the state and from the states of the token before, in this layer and in the next. Nothing of it
is needed but its effect on the next gates, so the correction stands multiplied with them.
Training: `moeserve.predictors.train_residual`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import Routing
from moeserve.predictors.base import Chances, Prediction, Predictor, any_row
from moeserve.predictors.gates import LayerGate, MakeProduct, check_gates, plain_product
from moeserve.predictors.residual_weights import ResidualWeights, TrainedPredictor
from moeserve.predictors.row_links import RowLinks

Rows = NDArray[np.float32]
Ids = NDArray[np.int64]
#: below it, e^-x is too large for float32
SMALLEST = np.float32(-80)


def unit_state(x: Tensor) -> Tensor:
    """[T, H] in any dtype to float32 rows whose root mean square is one."""
    rows = x.float()
    return rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + 1e-12)


def unit_rows(x: Tensor) -> Rows:
    """As `unit_state`, in numpy."""
    rows: Rows = x.float().cpu().numpy()
    squares = np.einsum("th,th->t", rows, rows)[:, None]
    unit: Rows = rows / np.sqrt(squares / rows.shape[1] + 1e-12)
    return unit


def unit_weights(weights: Tensor) -> Tensor:
    """[T, K] router weights to float32 with a mean of one in each row."""
    rows = weights.float()
    return rows / (rows.mean(dim=-1, keepdim=True) + 1e-12)


class View:
    """The trained weights of one layer, its products with the state put together into one.

    In numpy: of a few rows, each of torch's calls takes longer than what it computes.
    """

    def __init__(
        self,
        own: ResidualWeights | None,
        behind: ResidualWeights | None,
        make_product: MakeProduct,
    ) -> None:
        """own: None for the last layer, which looks at nothing. behind: the weights of the layer
        before, whose `past_next` is of this layer's states."""
        parts = []
        self.looks = own is not None
        self._outputs = self._rank = 0
        if own is not None:
            hidden = own.past.shape[1]
            self._num_experts = own.num_experts
            self._outputs, self._rank = len(own.linear), len(own.here)
            parts = [own.linear[:, :hidden], own.here[:, :hidden], own.past]
            # [E, D * E + R]: what an expert's weight alone adds
            self._chosen = _array(torch.cat([own.linear[:, hidden:], own.here[:, hidden:]]).T)
            self._bias = _array(torch.cat([own.bias, own.context_bias]))
            self._context_out = _array(own.context_out)
            self._expert_in = _array(own.expert_in)
            self._expert_bias = _array(own.expert_bias)
            self._expert_out = _array(own.expert_out)
        if behind is not None:
            parts.append(behind.past_next)
        self._product = make_product(torch.cat(parts), None)  # to [T, D * E + 2 * R (+ R)]

    def products(self, state: Rows) -> tuple[Rows, Rows, Rows]:
        """[T, H] to [T, D * E + R], outputs and context of these rows; [T, R], for the context of
        the rows that follow them; [T, R], the same for the layer before ([T, 0] if there is none).
        """
        products: Rows = self._product(torch.from_numpy(state)).numpy()
        near, far = self._outputs + self._rank, self._outputs + 2 * self._rank
        return products[:, :near], products[:, near:far], products[:, far:]

    def chances(self, state: Rows, near: Rows, ids: Ids, weights: Rows) -> Chances:
        """[T, D * E]. near: of `products`, with what is known of the past added. ids, weights: [T,
        K], unit weights."""
        total = near + self._bias
        total += np.matmul(weights[:, None], self._chosen[ids])[:, 0]
        logits = total[:, : self._outputs]
        logits += _silu(total[:, self._outputs :]) @ self._context_out
        logits += self._expert_part(state, ids, weights)
        chances: Chances = 1 / (1 + np.exp(-logits))
        return chances

    def _expert_part(self, state: Rows, ids: Ids, weights: Rows) -> Rows:
        """[T, D * E] of the chosen experts' hidden layers."""
        if ids.size <= self._num_experts:  # a few rows: only what they chose
            # One by one: gathered, their weights would be copied first.
            each_in = [
                self._expert_in[expert] @ row
                for row, chosen in zip(state, ids.tolist(), strict=True)
                for expert in chosen
            ]
            inner = np.array(each_in).reshape(*ids.shape, -1)  # [T, K, U]
            inner = _silu(inner + self._expert_bias[ids]) * weights[..., None]
            each = np.matmul(inner[..., None, :], self._expert_out[ids])  # [T, K, 1, D * E]
            total: Rows = each[..., 0, :].sum(axis=1)
            return total
        experts, units, hidden = self._expert_in.shape
        inner = state @ self._expert_in.reshape(-1, hidden).T
        inner = _silu(inner.reshape(-1, experts, units) + self._expert_bias)
        dense = np.zeros((len(state), experts), np.float32)
        np.put_along_axis(dense, ids, weights, axis=1)
        inner *= dense[..., None]
        out: Rows = inner.reshape(len(state), -1) @ self._expert_out.reshape(experts * units, -1)
        return out


def _array(tensor: Tensor) -> Rows:
    array: Rows = tensor.contiguous().numpy()
    return array


def _silu(x: Rows) -> Rows:
    # exp of a very negative number's opposite is inf, and x / inf the 0 that it should be
    result: Rows = x / (1 + np.exp(-np.maximum(x, SMALLEST)))
    return result


class GateResidual(Predictor):
    """P(wanted) of the next layers by trained views. Keeps the last step's part of the context."""

    name = "gate_residual"

    def __init__(
        self,
        trained: TrainedPredictor,
        gates: Sequence[LayerGate],
        depth: int,
        make_product: MakeProduct = plain_product,
    ) -> None:
        """gates: of all MoE layers. depth: layers to look ahead, at most as many as trained for.
        make_product: how the products with the states are computed.

        Raises ModelError where the layers differ too much.
        """
        check_gates(gates)
        layers = [gate.layer for gate in gates]
        self._num_experts = gates[0].num_experts
        self._ahead = {
            layer: layers[place + 1 : place + 1 + min(depth, trained.shape.depth)]
            for place, layer in enumerate(layers)
        }
        self._after = dict(pairwise(layers))
        views = trained.views
        befores = [None, *layers]
        self._views = {
            layer: View(
                views.get(layer), None if before is None else views.get(before), make_product
            )
            for layer, before in zip(layers, befores, strict=False)
            if layer in views or before in views
        }
        self._links = RowLinks()
        #: [T, R] by layer, of the last and the running step: parts of the next row's context
        self._last: dict[int, Rows] = {}
        self._last_next: dict[int, Rows] = {}
        self._now: dict[int, Rows] = {}
        self._now_next: dict[int, Rows] = {}
        self._layer = sys.maxsize  # whatever layer comes first begins a step

    def begin_step(self, previous_rows: NDArray[np.int64]) -> None:
        self._links.tell(previous_rows)
        self._layer = sys.maxsize  # whatever layer is asked for first

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """As the base class; says nothing of the next token's layers."""
        found = self.row_chances(layer, x, routing)
        return Prediction({n: torch.from_numpy(any_row(chances)) for n, chances in found.items()})

    def row_chances(self, layer: int, x: Tensor, routing: Routing) -> dict[int, Chances]:
        """By layer ahead, [T, E]: P(chosen) of every row for itself. In place of `predict`."""
        if len(x) == 0:
            return {}
        if layer <= self._layer or len(x) != self._links.num_rows:
            self._turn(len(x))
        self._layer = layer
        view = self._views.get(layer)
        if view is None:
            return {}
        state = unit_rows(x)
        near, self._now[layer], self._now_next[layer] = view.products(state)
        if not view.looks:
            return {}
        near = self._with_past(layer, near)
        ids: Ids = routing.ids.cpu().numpy()
        weights = routing.weights.float().cpu().numpy()
        weights = weights / (weights.mean(axis=1, keepdims=True) + 1e-12)
        each = view.chances(state, near, ids, weights).reshape(len(x), -1, self._num_experts)
        return {ahead: each[:, n] for n, ahead in enumerate(self._ahead[layer])}

    def _with_past(self, layer: int, near: Rows) -> Rows:
        """Adds to the context of each row what the token before it left."""
        past, past_next = self._last.get(layer), self._last_next.get(self._after[layer])
        if past is None or past_next is None or len(past) == 0:
            return near
        rank = past.shape[1]
        near[self._links.rows, -rank:] += past + past_next
        return near

    def _turn(self, num_rows: int) -> None:
        """The running step becomes the last one, of which only what goes on is kept."""
        self._links.turn(num_rows)
        before = self._links.before
        self._last = {layer: part[before] for layer, part in self._now.items()}
        self._last_next = {layer: part[before] for layer, part in self._now_next.items()}
        self._now, self._now_next = {}, {}
