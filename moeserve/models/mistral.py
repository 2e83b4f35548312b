"""Mistral (arXiv:2310.06825): dense, as Llama; in the first version every layer slides."""

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
    # Only a field that is there and null means no window; the first version's is the default.
    window = reader.optional_integer("sliding_window")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=reader.integer("num_attention_heads"),
            num_kv_heads=read_kv_heads(reader),
            head_dim=head_dim,
            rope=read_rope(reader, head_dim),
            window=window if reader.names("sliding_window") else 4096,
        ),
        ffn=DenseFfnSpec(
            intermediate_size=reader.integer("intermediate_size"),
            activation=read_activation(reader),
        ),
    )
    return read_frame(reader, [layer] * reader.integer("num_hidden_layers"), norm_eps=1e-6)


FAMILY = Family("mistral", read)
