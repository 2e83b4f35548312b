"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671, section 2.2.2): a gated shared expert."""

from __future__ import annotations

from moeserve.core import ExpertSpec
from moeserve.experts.router import RouterSpec
from moeserve.models.config_reader import ConfigReader
from moeserve.models.config_sections import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    read_activation,
    read_frame,
    read_head_dim,
    read_kv_heads,
    read_layer_windows,
    read_rope,
    read_sparse_layers,
)
from moeserve.models.family import Family
from moeserve.models.sources import FfnNames
from moeserve.models.spec import (
    AttentionSpec,
    DenseFfnSpec,
    LayerSpec,
    ModelSpec,
    MoeFfnSpec,
    SharedExpertSpec,
)


def read(reader: ConfigReader) -> ModelSpec:
    head_dim = read_head_dim(reader)
    dense = DenseFfnSpec(
        intermediate_size=reader.integer("intermediate_size"), activation=read_activation(reader)
    )
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                num_heads=reader.integer("num_attention_heads"),
                num_kv_heads=read_kv_heads(reader),
                head_dim=head_dim,
                rope=read_rope(reader, head_dim),
                window=window,
                qkv_bias=reader.flag("qkv_bias", default=True),
            ),
            ffn=_read_moe(reader) if sparse else dense,
        )
        for window, sparse in zip(_windows(reader), read_sparse_layers(reader), strict=True)
    ]
    return read_frame(reader, layers, norm_eps=1e-6)


def _read_moe(reader: ConfigReader) -> MoeFfnSpec:
    hidden, experts = reader.integer("hidden_size"), reader.integer("num_experts", default=60)
    activation = read_activation(reader)
    shared = reader.integer("shared_expert_intermediate_size", default=5632)
    return MoeFfnSpec(
        router=RouterSpec(
            num_experts=experts,
            top_k=reader.integer("num_experts_per_tok", default=4),
            hidden_size=hidden,
            normalize=reader.flag("norm_topk_prob", default=False),
            round_weights=True,
        ),
        experts=ExpertSpec(
            num_experts=experts,
            hidden_size=hidden,
            intermediate_size=reader.integer("moe_intermediate_size", default=1408),
            activation=activation,
        ),
        shared=SharedExpertSpec(
            ffn=DenseFfnSpec(intermediate_size=shared, activation=activation), gated=True
        ),
    )


def _windows(reader: ConfigReader) -> tuple[int | None, ...]:
    """Sliding layers are named in layer_types, or are the even ones below max_window_layers."""
    slides = reader.flag("use_sliding_window", default=False)
    window = reader.integer("sliding_window", default=4096, at_least=1 if slides else 0)
    bound = reader.integer("max_window_layers", default=28, at_least=0)
    default = [
        SLIDING_ATTENTION if slides and layer % 2 == 0 and layer < bound else FULL_ATTENTION
        for layer in range(reader.integer("num_hidden_layers"))
    ]
    return read_layer_windows(reader, window if slides else None, default)


FAMILY = Family("qwen2_moe", read, FfnNames(shared="shared_expert"))
