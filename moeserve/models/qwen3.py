"""Qwen3 (arXiv:2505.09388), dense: a norm on every query and key head; late layers may slide."""

from __future__ import annotations

from moeserve.models.config_reader import ConfigReader
from moeserve.models.config_sections import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    read_activation,
    read_frame,
    read_kv_heads,
    read_layer_windows,
    read_rope,
)
from moeserve.models.family import Family
from moeserve.models.spec import AttentionSpec, DenseFfnSpec, LayerSpec, ModelSpec, QkNorm


def read(reader: ConfigReader) -> ModelSpec:
    head_dim = reader.integer("head_dim", default=128)
    bias = reader.flag("attention_bias", default=False)
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
                qkv_bias=bias,
                output_bias=bias,
                qk_norm=QkNorm.HEAD,
            ),
            ffn=ffn,
        )
        for window in read_windows(reader)
    ]
    return read_frame(reader, layers, norm_eps=1e-6)


def read_windows(reader: ConfigReader) -> tuple[int | None, ...]:
    """Sliding layers are named in layer_types, or are those from max_window_layers on."""
    window = reader.optional_integer("sliding_window", at_least=0)
    if not reader.flag("use_sliding_window", default=False):
        window = None
    full = reader.integer("max_window_layers", default=28, at_least=0)
    default = [
        SLIDING_ATTENTION if window is not None and layer >= full else FULL_ATTENTION
        for layer in range(reader.integer("num_hidden_layers"))
    ]
    return read_layer_windows(reader, window, default)


FAMILY = Family("qwen3", read)
