"""A layer's router in the form in which predictors use it on other layers' hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.cpu_backend.linear import make_linear
from moeserve.experts.router import Router
from moeserve.predictors.gates import LayerGate


def layer_gate(layer: int, router: Router, norm_weight: Tensor) -> LayerGate:
    """The gate of MoE layer `layer`, on the CPU in float32.

    norm_weight: [H], of the RMS norm before it.
    """
    weights = router.weights
    weight = weights.weight
    if not isinstance(weight, Tensor):  # packed: its rows are what it makes of the unit vectors
        weight = make_linear(weight)(torch.eye(router.spec.hidden_size)).T.contiguous()
    return LayerGate(
        layer,
        router.spec.top_k,
        norm_weight.float().cpu(),
        weight.float().cpu(),
        None if weights.bias is None else weights.bias.float().cpu(),
        None if router.ranks_logits else router.ranking,
    )
