"""The gates of a loaded model, as predictors want them."""

from __future__ import annotations

from moeserve.cpu_backend.native_linear import NativeRmsNorm
from moeserve.experts.gates import layer_gate
from moeserve.experts.router import Router
from moeserve.models.layers import RmsNorm
from moeserve.models.transformer import MoeFfn, Transformer
from moeserve.predictors.gates import LayerGate


def model_gates(model: Transformer) -> tuple[LayerGate, ...]:
    """The gate of every MoE layer, in rising order."""
    gates = []
    for index, layer in enumerate(model.layers):
        if isinstance(layer.ffn, MoeFfn):
            norm = layer.ffn_norm
            assert isinstance(norm, RmsNorm | NativeRmsNorm), f"layer {index}: norm of another kind"
            router = layer.ffn.routed.router
            assert isinstance(router, Router), f"layer {index}: its routing is forced"
            gates.append(layer_gate(index, router, norm.weight))
    return tuple(gates)
