"""The gates of a loaded model, as predictors want them."""

from __future__ import annotations

from moeserve.cpu_backend.native_linear import NativeRmsNorm
from moeserve.experts.gates import layer_gate
from moeserve.experts.router import Router
from moeserve.models.layers import RmsNorm
from moeserve.models.transformer import DecoderLayer, MoeFfn, Transformer
from moeserve.predictors.gates import LayerGate


def model_gates(model: Transformer) -> tuple[LayerGate, ...]:
    """The gate of every MoE layer, in rising order."""
    layers = enumerate(model.layers)
    return tuple(gate_of(index, layer) for index, layer in layers if isinstance(layer.ffn, MoeFfn))


def gate_of(index: int, layer: DecoderLayer) -> LayerGate:
    """The gate of one MoE layer."""
    norm, ffn = layer.ffn_norm, layer.ffn
    assert isinstance(ffn, MoeFfn), f"layer {index}: not a Mixture-of-Experts"
    assert isinstance(norm, RmsNorm | NativeRmsNorm), f"layer {index}: norm of another kind"
    router = ffn.routed.router
    assert isinstance(router, Router), f"layer {index}: its routing is forced"
    return layer_gate(index, router, norm.weight)
