"""Qwen3-MoE (arXiv:2505.09388): Qwen3's attention, softmax routing, no shared expert."""

from __future__ import annotations

from moeserve.core import ExpertSpec
from moeserve.experts.router import RouterSpec
from moeserve.models.config_reader import ConfigReader
from moeserve.models.config_sections import (
    read_activation,
    read_frame,
    read_head_dim,
    read_kv_heads,
    read_rope,
    read_sparse_layers,
)
from moeserve.models.family import Family
from moeserve.models.spec import (
    AttentionSpec,
    DenseFfnSpec,
    LayerSpec,
    ModelSpec,
    MoeFfnSpec,
    QkNorm,
)


def read(reader: ConfigReader) -> ModelSpec:
    head_dim = read_head_dim(reader)
    bias = reader.flag("attention_bias", default=False)
    attention = AttentionSpec(
        num_heads=reader.integer("num_attention_heads"),
        num_kv_heads=read_kv_heads(reader),
        head_dim=head_dim,
        rope=read_rope(reader, head_dim),
        window=_window(reader),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=QkNorm.HEAD,
    )
    dense = DenseFfnSpec(
        intermediate_size=reader.integer("intermediate_size", default=6144),
        activation=read_activation(reader),
    )
    moe = _read_moe(reader)
    layers = [
        LayerSpec(attention=attention, ffn=moe if sparse else dense)
        for sparse in read_sparse_layers(reader)
    ]
    return read_frame(reader, layers, norm_eps=1e-6)


def _read_moe(reader: ConfigReader) -> MoeFfnSpec:
    hidden = reader.integer("hidden_size")
    experts = reader.integer("num_experts", "num_local_experts", default=128)
    return MoeFfnSpec(
        router=RouterSpec(
            num_experts=experts,
            top_k=reader.integer("num_experts_per_tok", default=8),
            hidden_size=hidden,
            normalize=reader.flag("norm_topk_prob", default=False),
            round_weights=True,
        ),
        experts=ExpertSpec(
            num_experts=experts,
            hidden_size=hidden,
            intermediate_size=reader.integer("moe_intermediate_size", default=768),
            activation=read_activation(reader),
        ),
    )


def _window(reader: ConfigReader) -> int | None:
    """All layers slide or none. max_window_layers, which some configs name, decides nothing."""
    slides = reader.flag("use_sliding_window", default=False)
    window = reader.optional_integer("sliding_window", at_least=1 if slides else 0)
    if not slides:
        reader.ignore("max_window_layers")
    return window if slides else None


FAMILY = Family("qwen3_moe", read)
