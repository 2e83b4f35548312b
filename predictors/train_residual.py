"""Trains gate_residual's view from one layer, on recorded states.

Every output is a yes-or-no question, whether the row's router will choose the expert, so the loss
is the cross entropy of those. (Against the router's own distribution, the usual target of
distillation, recall was 2 to 3 points lower: it spends itself on probabilities among experts that
are never chosen.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear, silu

from moeserve.predictors.gate_residual import unit_weights
from moeserve.predictors.gates import LayerGate, moved_weight
from moeserve.predictors.residual_weights import (
    PARTS,
    ResidualShape,
    ResidualWeights,
    part_shapes,
)

#: rows of a step of the optimiser, its highest rate, and passes over the text
BATCH_ROWS = 1024
RATE = 8e-3
WARM_UP_SHARE = 0.3
EPOCHS = 2
#: of the rows, for so many the past is hidden, as it is at the start of a text and in a prompt
HIDDEN_PAST = 0.05


@dataclass(frozen=True)
class ViewData:
    """Recorded rows of one layer and of the layers after it.

    states, next_states: [N, H] unit states of this layer and of the next, any float dtype.
    ids [N, K], weights [N, K]: this layer's routing. later_ids: [N, K] of each layer ahead.
    follows: [N] bool, whether the row before is the token before.
    """

    states: Tensor
    next_states: Tensor
    ids: Tensor
    weights: Tensor
    later_ids: Sequence[Tensor]
    follows: Tensor


def train_view(
    data: ViewData,
    source: LayerGate,
    targets: Sequence[LayerGate],
    shape: ResidualShape,
    progress: Callable[[float], None],
    epochs: int = EPOCHS,
) -> ResidualWeights:
    """The same rows give the same weights. targets: the gates of the layers ahead, which the linear
    part starts from."""
    generator = torch.Generator().manual_seed(source.layer)
    weights = _start(source, targets, shape, generator)
    parts = [getattr(weights, name).requires_grad_() for name in PARTS]
    num_rows = len(data.states)
    per_epoch = math.ceil(num_rows / BATCH_ROWS)
    optimiser = torch.optim.Adam(parts, lr=RATE, betas=(0.9, 0.99))
    total = epochs * per_epoch
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total, pct_start=WARM_UP_SHARE)
    done = 0
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(num_rows, generator=generator).split(BATCH_ROWS):
                loss = _loss(weights, data, rows, generator)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                rate.step()
                done += 1
                progress(done / total)
    return ResidualWeights(**{name: getattr(weights, name).detach() for name in PARTS})


def _start(
    source: LayerGate,
    targets: Sequence[LayerGate],
    shape: ResidualShape,
    generator: torch.Generator,
) -> ResidualWeights:
    hidden, experts = source.weight.shape[1], source.num_experts
    parts = {}
    for name, size in part_shapes(shape, hidden, experts, len(targets)).items():
        parts[name] = torch.zeros(size)
        if name not in ("bias", "expert_bias", "context_bias"):
            fan_in = size[-1] if name not in ("expert_out", "context_out") else size[-2]
            parts[name].uniform_(-1, 1, generator=generator).mul_(fan_in**-0.5)
    gates = torch.cat([moved_weight(source, target) for target in targets])
    parts["linear"][:, :hidden] = gates
    parts["linear"][:, hidden:] = 0
    biases = [torch.zeros(experts) if t.bias is None else t.bias for t in targets]
    parts["bias"] += torch.cat(biases)
    return ResidualWeights(**parts)


def forward(
    weights: ResidualWeights, state: Tensor, dense: Tensor, past: Tensor, past_next: Tensor
) -> Tensor:
    """[T, D * E] logits, differentiable. dense: [T, E] unit weights, 0 where not chosen."""
    both = torch.cat([state, dense], dim=1)
    context = linear(both, weights.here, weights.context_bias)
    context = context + linear(past, weights.past) + linear(past_next, weights.past_next)
    inner = linear(state, weights.expert_in.flatten(0, 1), weights.expert_bias.flatten())
    inner = silu(inner).unflatten(1, weights.expert_bias.shape) * dense[..., None]
    total = linear(both, weights.linear, weights.bias) + silu(context) @ weights.context_out
    logits: Tensor = total + inner.flatten(1) @ weights.expert_out.flatten(0, 1)
    return logits


def _loss(
    weights: ResidualWeights, data: ViewData, rows: Tensor, generator: torch.Generator
) -> Tensor:
    experts = weights.num_experts
    ids = data.ids[rows].long()
    dense = torch.zeros(len(rows), experts).scatter_(1, ids, unit_weights(data.weights[rows]))
    before = (rows - 1).clamp(min=0)
    known = data.follows[rows] & (torch.rand(len(rows), generator=generator) >= HIDDEN_PAST)
    past = data.states[before].float() * known[:, None]
    past_next = data.next_states[before].float() * known[:, None]
    logits = forward(weights, data.states[rows].float(), dense, past, past_next)
    chosen = [
        torch.zeros(len(rows), experts).scatter_(1, later[rows].long(), 1.0)
        for later in data.later_ids
    ]
    return binary_cross_entropy_with_logits(logits, torch.cat(chosen, dim=1))
