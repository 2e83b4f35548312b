"""The slow oracle: what an MoE layer computes, one token and one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.core import ExpertSpec, ExpertWeights, Routing
from moeserve.cpu_backend.activations import gated_activation


def reference_experts(
    spec: ExpertSpec, weights: ExpertWeights, x: Tensor, routing: Routing
) -> Tensor:
    """x [T, H] to [T, H] in the dtype of x: the weighted sum of each token's experts.

    float64 in, float64 all through, whatever the dtype of the weights.
    """
    activation = gated_activation(spec)
    y = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, factor in zip(routing.ids[token], routing.weights[token], strict=True):
            hidden = weights.gate_up[expert].to(x.dtype) @ x[token]  # [2I]
            if weights.gate_up_bias is not None:
                hidden = hidden + weights.gate_up_bias[expert].to(x.dtype)
            out = weights.down[expert].to(x.dtype) @ activation(hidden)  # [H]
            if weights.down_bias is not None:
                out = out + weights.down_bias[expert].to(x.dtype)
            y[token] += factor.to(x.dtype) * out
    return y
