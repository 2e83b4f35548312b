"""Puts a Transformer together from its spec and its loaded tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeserve.core import ExpertWeights
from moeserve.cpu_backend.activations import elementwise_activation
from moeserve.experts.layer import ExpertRuntime, build_moe_layer
from moeserve.experts.router import RouterWeights
from moeserve.models.attention import Attention, AttentionWeights, LatentAttention, MlaWeights
from moeserve.models.layers import GatedFfn, Linear, RmsNorm, SharedExpert
from moeserve.models.spec import (
    AttentionSpec,
    DenseFfnSpec,
    LayerSpec,
    MlaSpec,
    ModelSpec,
    MoeFfnSpec,
    QkNorm,
)
from moeserve.models.transformer import DecoderLayer, MoeFfn, Transformer


def build_transformer(
    spec: ModelSpec, tensors: Mapping[str, Tensor], runtime: ExpertRuntime
) -> Transformer:
    """tensors: by the target names of weight_rules; all of the spec's, on one device."""
    embedding = tensors["embedding"]
    layers = []
    for index, layer in enumerate(spec.layers):
        prefix = f"layers.{index}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        layers.append(_build_layer(spec, index, layer, own, runtime))
    return Transformer(
        spec,
        embedding,
        tuple(layers),
        RmsNorm(tensors["norm"], spec.norm_eps),
        embedding if spec.tie_word_embeddings else tensors["head"],
    )


def _build_layer(
    spec: ModelSpec,
    index: int,
    layer: LayerSpec,
    tensors: Mapping[str, Tensor],
    runtime: ExpertRuntime,
) -> DecoderLayer:
    ffn: GatedFfn | MoeFfn
    if isinstance(layer.ffn, DenseFfnSpec):
        ffn = _build_ffn(layer.ffn, tensors, "ffn.")
    else:
        ffn = _build_moe(index, layer.ffn, tensors, runtime)
    if isinstance(layer.attention, MlaSpec):
        attention: Attention | LatentAttention = _build_latent(layer.attention, tensors)
    else:
        attention = _build_grouped(layer.attention, tensors, spec.norm_eps)
    return DecoderLayer(
        RmsNorm(tensors["attention_norm"], spec.norm_eps),
        attention,
        RmsNorm(tensors["ffn_norm"], spec.norm_eps),
        ffn,
    )


def _linear(tensors: Mapping[str, Tensor], name: str) -> Linear:
    return Linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _build_ffn(spec: DenseFfnSpec, tensors: Mapping[str, Tensor], prefix: str) -> GatedFfn:
    return GatedFfn(
        _linear(tensors, f"{prefix}gate_up"),
        _linear(tensors, f"{prefix}down"),
        elementwise_activation(spec.activation),
    )


def _build_moe(
    layer: int, spec: MoeFfnSpec, tensors: Mapping[str, Tensor], runtime: ExpertRuntime
) -> MoeFfn:
    router = RouterWeights(
        tensors["router.weight"], tensors.get("router.bias"), tensors.get("router.correction")
    )
    experts = ExpertWeights(
        tensors["experts.gate_up"],
        tensors["experts.down"],
        tensors.get("experts.gate_up_bias"),
        tensors.get("experts.down_bias"),
    )
    shared = None
    if spec.shared is not None:
        gated = _build_ffn(spec.shared.ffn, tensors, "shared.")
        shared = SharedExpert(gated, tensors.get("shared.gate"))
    return MoeFfn(
        build_moe_layer(layer, spec.router, spec.experts, router, experts, runtime), shared
    )


def _build_grouped(
    spec: AttentionSpec, tensors: Mapping[str, Tensor], norm_eps: float
) -> Attention:
    bias, qk_norm = tensors.get("qkv.bias"), tensors.get("qk_norm")
    if qk_norm is not None and spec.qk_norm is QkNorm.HEAD:
        qk_norm = torch.cat((qk_norm[:1].expand(spec.heads_per_kv_head, -1), qk_norm[1:]))
    weights = AttentionWeights(
        qkv=Linear(tensors["qkv.weight"].flatten(0, 2), None if bias is None else bias.flatten()),
        output=_linear(tensors, "output"),
        qk_norm=qk_norm,
        sinks=tensors.get("sinks"),
    )
    return Attention(spec, weights, norm_eps)


def _build_latent(spec: MlaSpec, tensors: Mapping[str, Tensor]) -> LatentAttention:
    ranked = spec.q_lora_rank is not None
    weights = MlaWeights(
        query=_linear(tensors, "query"),
        kv_down=_linear(tensors, "kv_down"),
        kv_norm=RmsNorm(tensors["kv_norm"], spec.latent_norm_eps),
        key_up=tensors["key_up"],
        value_up=tensors["value_up"],
        output=_linear(tensors, "output"),
        q_norm=RmsNorm(tensors["q_norm"], spec.latent_norm_eps) if ranked else None,
        q_up=_linear(tensors, "q_up") if ranked else None,
    )
    return LatentAttention(spec, weights)
