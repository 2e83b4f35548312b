"""Llama (arXiv:2302.13971, 2407.21783): dense, grouped-query attention."""

from __future__ import annotations

from moeserve.models.config_reader import ConfigReader
from moeserve.models.config_sections import (
    read_activation,
    read_frame,
    read_head_dim,
    read_kv_heads,
    read_rope,
)
from moeserve.models.family import Family
from moeserve.models.spec import AttentionSpec, DenseFfnSpec, LayerSpec, ModelSpec


def read(reader: ConfigReader) -> ModelSpec:
    head_dim = read_head_dim(reader)
    bias = reader.flag("attention_bias", default=False)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=reader.integer("num_attention_heads"),
            num_kv_heads=read_kv_heads(reader),
            head_dim=head_dim,
            rope=read_rope(reader, head_dim),
            qkv_bias=bias,
            output_bias=bias,
        ),
        ffn=DenseFfnSpec(
            intermediate_size=reader.integer("intermediate_size"),
            activation=read_activation(reader),
            bias=reader.flag("mlp_bias", default=False),
        ),
    )
    return read_frame(reader, [layer] * reader.integer("num_hidden_layers"), norm_eps=1e-6)


FAMILY = Family("llama", read)
