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
from torch.nn.functional import linear, silu

from moeserve.core import Routing
from moeserve.predictors.base import Chances, Prediction, Predictor, any_row
from moeserve.predictors.gates import LayerGate, check_gates
from moeserve.predictors.residual_weights import ResidualWeights, TrainedPredictor
from moeserve.predictors.row_links import RowLinks


def unit_state(x: Tensor) -> Tensor:
    """[T, H] in any dtype to float32 rows whose root mean square is one."""
    rows = x.float()
    return rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + 1e-12)


def unit_weights(weights: Tensor) -> Tensor:
    """[T, K] router weights to float32 with a mean of one in each row."""
    rows = weights.float()
    return rows / (rows.mean(dim=-1, keepdim=True) + 1e-12)


class View:
    """The trained weights of one layer, its products with the state put together into one.

    behind: the weights of the layer before, whose `past_next` is of this layer's states; own: None
    for the last layer, which looks at nothing.
    """

    def __init__(self, own: ResidualWeights | None, behind: ResidualWeights | None) -> None:
        self.own = own
        parts = []
        if own is not None:
            hidden = own.past.shape[1]
            self._chosen = torch.cat([own.linear[:, hidden:], own.here[:, hidden:]]).T.contiguous()
            parts = [own.linear[:, :hidden], own.here[:, :hidden], own.past]
        if behind is not None:
            parts.append(behind.past_next)
        self._state = torch.cat(parts)  # [D * E + 2 * R (+ R), H]
        self._sizes = [len(part) for part in parts]

    def products(self, state: Tensor) -> list[Tensor]:
        """[T, H] to [T, D * E], [T, R], [T, R] of this layer and [T, R] of the one before."""
        return list(linear(state, self._state).split(self._sizes, dim=1))

    def logits(
        self,
        state: Tensor,
        direct: Tensor,
        context: Tensor,
        routing: Routing,
    ) -> Tensor:
        """[T, D * E]. direct, context: the products, what is known of the past added to context."""
        own = self.own
        assert own is not None, "the last layer looks at nothing"
        ids, weights = routing.ids.cpu(), unit_weights(routing.weights.cpu())
        chosen = (self._chosen[ids] * weights[..., None]).sum(dim=1)  # [T, D * E + R]
        outputs = direct.shape[1]
        inner = silu(context + chosen[:, outputs:] + own.context_bias)
        total = direct + chosen[:, :outputs] + own.bias + inner @ own.context_out
        return total + self._expert_part(own, state, ids, weights)

    @staticmethod
    def _expert_part(own: ResidualWeights, state: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """[T, D * E] of the chosen experts' hidden layers."""
        if ids.numel() < own.num_experts:  # a few rows: only what they chose
            inner = (own.expert_in[ids] @ state[:, None, :, None])[..., 0]  # [T, K, U]
            inner = silu(inner + own.expert_bias[ids]) * weights[..., None]
            return (inner[..., None, :] @ own.expert_out[ids])[..., 0, :].sum(dim=1)
        inner = linear(state, own.expert_in.flatten(0, 1), own.expert_bias.flatten())
        inner = silu(inner).unflatten(1, own.expert_bias.shape)  # [T, E, U]
        dense = torch.zeros(len(state), own.num_experts).scatter_(1, ids, weights)
        out: Tensor = (inner * dense[..., None]).flatten(1) @ own.expert_out.flatten(0, 1)
        return out


class GateResidual(Predictor):
    """P(wanted) of the next layers by trained views. Keeps the last step's part of the context."""

    name = "gate_residual"

    def __init__(self, trained: TrainedPredictor, gates: Sequence[LayerGate], depth: int) -> None:
        """gates: of all MoE layers. depth: layers to look ahead, at most as many as trained for.

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
            layer: View(views.get(layer), None if before is None else views.get(before))
            for layer, before in zip(layers, befores, strict=False)
            if layer in views or before in views
        }
        self._links = RowLinks()
        #: [T, R] by layer, of the last and the running step: parts of the next row's context
        self._last: dict[int, Tensor] = {}
        self._last_next: dict[int, Tensor] = {}
        self._now: dict[int, Tensor] = {}
        self._now_next: dict[int, Tensor] = {}
        self._layer = sys.maxsize  # whatever layer comes first begins a step

    def begin_step(self, previous_rows: NDArray[np.int64]) -> None:
        self._links.tell(previous_rows)

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """As the base class; says nothing of the next token's layers."""
        found = self.row_chances(layer, x, routing)
        return Prediction({n: torch.from_numpy(any_row(chances)) for n, chances in found.items()})

    def row_chances(self, layer: int, x: Tensor, routing: Routing) -> dict[int, Chances]:
        """By layer ahead, [T, E]: P(chosen) of every row for itself. In place of `predict`."""
        if len(x) == 0:
            return {}
        if layer <= self._layer:
            self._turn(len(x))
        self._layer = layer
        view = self._views.get(layer)
        if view is None:
            return {}
        state = unit_state(x.cpu())
        products = view.products(state)
        if view.own is None:
            self._now_next[layer] = products[0]
            return {}
        direct, context, self._now[layer], *rest = products
        if rest:
            self._now_next[layer] = rest[0]
        for past in (self._last.get(layer), self._last_next.get(self._after[layer])):
            if past is not None:
                context = context.index_add(0, torch.from_numpy(self._links.rows), past)
        chances = view.logits(state, direct, context, routing).sigmoid()
        each = chances.unflatten(1, (-1, self._num_experts)).unbind(1)
        return {n: part.numpy() for n, part in zip(self._ahead[layer], each, strict=False)}

    def _turn(self, num_rows: int) -> None:
        """The running step becomes the last one, of which only what goes on is kept."""
        self._links.turn(num_rows)
        before = torch.from_numpy(self._links.before)
        self._last = {layer: part[before] for layer, part in self._now.items()}
        self._last_next = {layer: part[before] for layer, part in self._now_next.items()}
        self._now, self._now_next = {}, {}
