"""Puts a Transformer together from its spec and its loaded tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeserve.core import ExpertWeights
from moeserve.cpu_backend.activations import elementwise_activation
from moeserve.cpu_backend.linear import make_linear
from moeserve.cpu_backend.native_ffn import NativeFfn
from moeserve.cpu_backend.native_linear import NativeHead, NativeLinear, NativeRmsNorm
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackedWeight
from moeserve.experts.gates import layer_gate
from moeserve.experts.layer import build_moe_layer
from moeserve.experts.router import Router, RouterWeights, shared_gate_spec
from moeserve.experts.runtime import ExpertRuntime
from moeserve.models.attention import Attention, AttentionWeights, LatentAttention, MlaWeights
from moeserve.models.attention_plan import NativeAttention, TorchAttention
from moeserve.models.layers import GatedFfn, Head, RmsNorm, RowFunction, WeighedFfn
from moeserve.models.native_layer import (
    FusedFfn,
    FusedHalves,
    fuse_attention,
    fuse_experts,
    fuse_ffn,
)
from moeserve.models.spec import (
    AttentionSpec,
    DenseFfnSpec,
    LayerSpec,
    MlaSpec,
    ModelSpec,
    MoeFfnSpec,
    QkNorm,
)
from moeserve.models.targets import Weight
from moeserve.models.transformer import DecoderLayer, MoeFfn, Transformer
from moeserve.predictors.gates import LayerGate


def build_transformer(
    spec: ModelSpec, weights: Mapping[str, Weight], runtime: ExpertRuntime
) -> Transformer:
    """weights: by the target names of weight_rules; all of the spec's, on one device."""
    embedding = _tensor(weights, "embedding")
    layers = []
    for index, layer in enumerate(spec.layers):
        prefix = f"layers.{index}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        layers.append(build_layer(spec, index, layer, own, runtime))
    return Transformer(
        spec,
        embedding,
        tuple(layers),
        _build_head(spec, weights, runtime),
        TorchAttention.plan if runtime.native is None else NativeAttention.planner(runtime.native),
        runtime.watch.timeline,
    )


def expert_gates(spec: ModelSpec, weights: Mapping[str, Weight]) -> list[LayerGate]:
    """The gates of all MoE layers, as predictors apply them."""
    gates = []
    for index, ffn in spec.moe_layers.items():
        prefix = f"layers.{index}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        router = _router_weights(own)
        norm = _tensor(own, "ffn_norm")
        gates.append(layer_gate(index, Router(ffn.router, router), norm))
    return gates


def routed_experts(spec: ModelSpec, weights: Mapping[str, Weight]) -> dict[int, PackedExperts]:
    """The packed experts of every MoE layer."""
    found = {}
    for index in spec.moe_layers:
        experts = weights[f"layers.{index}.experts.gate_up"]
        assert isinstance(experts, PackedExperts), "experts are packed on the native backend only"
        found[index] = experts
    return found


def rest_bytes(weights: Mapping[str, Weight]) -> int:
    """Weights that every token needs: all but the routed experts."""
    rest = {id(w): w for name, w in weights.items() if ".experts." not in name}
    return sum(weight.nbytes for weight in rest.values())


def shared_bytes(weights: Mapping[str, Weight]) -> int:
    """Of these, the shared experts of all layers."""
    shared = {id(w): w for name, w in weights.items() if ".shared." in name}
    return sum(weight.nbytes for weight in shared.values())


def build_layer(
    spec: ModelSpec,
    index: int,
    layer: LayerSpec,
    weights: Mapping[str, Weight],
    runtime: ExpertRuntime,
) -> DecoderLayer:
    """weights: of this layer, without its prefix."""
    ffn: RowFunction | MoeFfn
    if isinstance(layer.ffn, DenseFfnSpec):
        ffn = _build_ffn(layer.ffn, weights, "ffn.", runtime.native)
    else:
        ffn = _build_moe(index, layer.ffn, weights, runtime)
    if isinstance(layer.attention, MlaSpec):
        attention: Attention | LatentAttention = _build_latent(layer.attention, weights, runtime)
    else:
        attention = _build_grouped(layer.attention, weights, spec.norm_eps)
    attention_norm = _norm(_tensor(weights, "attention_norm"), spec.norm_eps, runtime)
    ffn_norm = _norm(_tensor(weights, "ffn_norm"), spec.norm_eps, runtime)
    fused_ffn: FusedFfn | None
    if isinstance(ffn, MoeFfn):
        experts = weights["experts.gate_up"]
        fused_ffn = fuse_experts(runtime, ffn_norm, ffn.routed, experts, ffn.shared)
    else:
        fused_ffn = fuse_ffn(runtime.native, ffn_norm, ffn)
    fused = FusedHalves(fuse_attention(runtime.native, attention_norm, attention), fused_ffn)
    timeline = runtime.watch.timeline
    return DecoderLayer(attention_norm, attention, ffn_norm, ffn, index, timeline, fused)


def _build_head(
    spec: ModelSpec, weights: Mapping[str, Weight], runtime: ExpertRuntime
) -> RowFunction:
    weight = weights["head"]
    assert not isinstance(weight, PackedExperts)
    norm = _norm(_tensor(weights, "norm"), spec.norm_eps, runtime)
    linear = make_linear(weight, out_dtype=torch.float32)
    if isinstance(norm, NativeRmsNorm) and isinstance(linear, NativeLinear):
        return NativeHead(norm, linear)
    return Head(norm, linear)


def _tensor(weights: Mapping[str, Weight], name: str) -> Tensor:
    weight = weights[name]
    assert isinstance(weight, Tensor), f"{name}: not a plain tensor"
    return weight


def _optional(weights: Mapping[str, Weight], name: str) -> Tensor | None:
    return _tensor(weights, name) if name in weights else None


def _norm(weight: Tensor, eps: float, runtime: ExpertRuntime) -> RowFunction:
    if runtime.native is None:
        return RmsNorm(weight, eps)
    return NativeRmsNorm(runtime.native, weight, eps)


def _linear(weights: Mapping[str, Weight], name: str) -> RowFunction:
    weight = weights[f"{name}.weight"]
    assert not isinstance(weight, PackedExperts)
    return make_linear(weight, _optional(weights, f"{name}.bias"))


def _build_ffn(
    spec: DenseFfnSpec,
    weights: Mapping[str, Weight],
    prefix: str,
    native: NativeRuntime | None,
    gate: Router | None = None,
) -> RowFunction:
    """gate: weighs the output; None: its weight is 1."""
    packed = weights[f"{prefix}gate_up.weight"]
    if isinstance(packed, PackedExperts):
        assert native is not None, "only the native backend packs weights"
        assert gate is None or gate.native is not None, "packed FFNs have packed gates"
        return NativeFfn(native, packed, None if gate is None else gate.native)
    ffn = GatedFfn(
        _linear(weights, f"{prefix}gate_up"),
        _linear(weights, f"{prefix}down"),
        elementwise_activation(spec.activation),
    )
    return ffn if gate is None else WeighedFfn(ffn, gate)


def _build_moe(
    layer: int, spec: MoeFfnSpec, weights: Mapping[str, Weight], runtime: ExpertRuntime
) -> MoeFfn:
    router = _router_weights(weights)
    shared = None
    if spec.shared is not None:
        gate = None
        if spec.shared.gated:
            gate = Router(shared_gate_spec(spec.router.hidden_size), _shared_gate(weights))
        shared = _build_ffn(spec.shared.ffn, weights, "shared.", runtime.native, gate)
    experts = _experts(weights)
    return MoeFfn(
        build_moe_layer(layer, spec.router, spec.experts, router, experts, runtime), shared
    )


def _router_weights(weights: Mapping[str, Weight]) -> RouterWeights:
    gate = weights["router.weight"]
    assert not isinstance(gate, PackedExperts)
    return RouterWeights(
        gate, _optional(weights, "router.bias"), _optional(weights, "router.correction")
    )


def _shared_gate(weights: Mapping[str, Weight]) -> RouterWeights:
    gate = weights["shared.gate"]
    assert not isinstance(gate, PackedExperts)
    return RouterWeights(gate)


def _experts(weights: Mapping[str, Weight]) -> ExpertWeights | PackedExperts:
    gate_up = weights["experts.gate_up"]
    if isinstance(gate_up, PackedExperts):
        return gate_up
    return ExpertWeights(
        _tensor(weights, "experts.gate_up"),
        _tensor(weights, "experts.down"),
        _optional(weights, "experts.gate_up_bias"),
        _optional(weights, "experts.down_bias"),
    )


def _build_grouped(
    spec: AttentionSpec, weights: Mapping[str, Weight], norm_eps: float
) -> Attention:
    bias, qk_norm = _optional(weights, "qkv.bias"), _optional(weights, "qk_norm")
    if qk_norm is not None and spec.qk_norm is QkNorm.HEAD:
        query, key = qk_norm[:1], qk_norm[1:]
        qk_norm = torch.cat((query.expand(spec.heads_per_kv_head, -1), key))[None]
    qkv = weights["qkv.weight"]
    assert not isinstance(qkv, PackedExperts)
    # [kv_heads, G + 2, D, H]: packed weights number their rows through as flattening does
    flat = qkv if isinstance(qkv, PackedWeight) else qkv.flatten(0, 2)
    return Attention(
        spec,
        AttentionWeights(
            qkv=make_linear(flat, None if bias is None else bias.flatten()),
            output=_linear(weights, "output"),
            qk_norm=qk_norm,
            sinks=_optional(weights, "sinks"),
        ),
        norm_eps,
    )


def _build_latent(
    spec: MlaSpec, weights: Mapping[str, Weight], runtime: ExpertRuntime
) -> LatentAttention:
    ranked = spec.q_lora_rank is not None
    eps = spec.latent_norm_eps
    return LatentAttention(
        spec,
        MlaWeights(
            query=_linear(weights, "query"),
            kv_down=_linear(weights, "kv_down"),
            kv_norm=_tensor(weights, "kv_norm"),
            key_up=_tensor(weights, "key_up"),
            value_up=_tensor(weights, "value_up"),
            output=_linear(weights, "output"),
            q_norm=_norm(_tensor(weights, "q_norm"), eps, runtime) if ranked else None,
            q_up=_linear(weights, "q_up") if ranked else None,
        ),
    )
