"""OLMoE (arXiv:2409.02060): one norm over all queries and one over all keys."""

from __future__ import annotations

from moeserve.core import ExpertSpec
from moeserve.experts.router import RouterSpec
from moeserve.models.config_reader import ConfigReader
from moeserve.models.config_sections import read_activation, read_frame, read_kv_heads, read_rope
from moeserve.models.family import Family
from moeserve.models.spec import AttentionSpec, LayerSpec, ModelSpec, MoeFfnSpec, QkNorm


def read(reader: ConfigReader) -> ModelSpec:
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    if hidden % heads:
        raise reader.refusal("num_attention_heads", f"must divide hidden_size ({hidden})")
    reader.only("head_dim", hidden // heads, why="the query norm is as wide as the hidden state")
    bias = reader.flag("attention_bias", default=False)
    clip = reader.positive("clip_qkv") if reader.has("clip_qkv") else None
    experts = reader.integer("num_experts", "num_local_experts", default=64)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=read_kv_heads(reader),
            head_dim=hidden // heads,
            rope=read_rope(reader, hidden // heads),
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=QkNorm.PROJECTION,
            clip_qkv=clip,
        ),
        ffn=MoeFfnSpec(
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
                intermediate_size=reader.integer("intermediate_size"),
                activation=read_activation(reader),
            ),
        ),
    )
    return read_frame(reader, [layer] * reader.integer("num_hidden_layers"), norm_eps=1e-5)


FAMILY = Family("olmoe", read)
