"""GLM-4.5 (arXiv:2508.06471): DeepSeek-V3's routing, grouped-query attention, partial rotation."""

from __future__ import annotations

from moeserve.models.config_reader import ConfigReader
from moeserve.models.config_sections import (
    read_activation,
    read_frame,
    read_head_dim,
    read_kv_heads,
    read_rope,
)
from moeserve.models.deepseek_v3 import read_sigmoid_moe
from moeserve.models.family import Family
from moeserve.models.spec import AttentionSpec, DenseFfnSpec, LayerSpec, ModelSpec, QkNorm


def read(reader: ConfigReader) -> ModelSpec:
    head_dim = read_head_dim(reader)
    attention = AttentionSpec(
        num_heads=reader.integer("num_attention_heads"),
        num_kv_heads=read_kv_heads(reader),
        head_dim=head_dim,
        rope=read_rope(reader, head_dim, partial=0.5),
        qkv_bias=reader.flag("attention_bias", default=False),
        qk_norm=QkNorm.HEAD if reader.flag("use_qk_norm", default=False) else QkNorm.NONE,
    )
    dense = DenseFfnSpec(
        intermediate_size=reader.integer("intermediate_size"), activation=read_activation(reader)
    )
    moe = read_sigmoid_moe(reader, dense.activation, num_groups=1, top_groups=1, scale=1.0)
    num_dense = reader.integer("first_k_dense_replace", default=1, at_least=0)
    layers = [
        LayerSpec(attention=attention, ffn=dense if layer < num_dense else moe)
        for layer in range(reader.integer("num_hidden_layers"))
    ]
    return read_frame(reader, layers, norm_eps=1e-5, num_prediction_layers=1)


FAMILY = Family("glm4_moe", read)
