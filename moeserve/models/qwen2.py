"""Qwen2 and Qwen2.5 (arXiv:2407.10671), dense: biases on queries, keys and values."""

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
from moeserve.models.qwen3 import read_windows
from moeserve.models.spec import AttentionSpec, DenseFfnSpec, LayerSpec, ModelSpec


def read(reader: ConfigReader) -> ModelSpec:
    head_dim = read_head_dim(reader)
    ffn = DenseFfnSpec(
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
                qkv_bias=True,
            ),
            ffn=ffn,
        )
        for window in read_windows(reader)
    ]
    return read_frame(reader, layers, norm_eps=1e-6)


FAMILY = Family("qwen2", read)
