"""Mixtral (arXiv:2401.04088): every layer routes each token to the best experts by softmax."""

from __future__ import annotations

from collections.abc import Collection

from moeserve.core import ExpertSpec
from moeserve.experts.router import RouterSpec
from moeserve.models.config_reader import ConfigReader
from moeserve.models.config_sections import (
    read_activation,
    read_frame,
    read_head_dim,
    read_kv_heads,
    read_rope,
)
from moeserve.models.family import Family
from moeserve.models.sources import DEFAULT_NAMES, FfnNames
from moeserve.models.spec import AttentionSpec, LayerSpec, ModelSpec, MoeFfnSpec


def read(reader: ConfigReader) -> ModelSpec:
    head_dim = read_head_dim(reader)
    hidden, experts = reader.integer("hidden_size"), reader.integer("num_local_experts", default=8)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=reader.integer("num_attention_heads"),
            num_kv_heads=read_kv_heads(reader),
            head_dim=head_dim,
            rope=read_rope(reader, head_dim, default_theta=1_000_000.0),
            window=reader.optional_integer("sliding_window"),
        ),
        ffn=MoeFfnSpec(
            router=RouterSpec(
                num_experts=experts,
                top_k=reader.integer("num_experts_per_tok", default=2),
                hidden_size=hidden,
                normalize=True,
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


def ffn_names(names: Collection[str]) -> FfnNames:
    """Mistral's names, or transformers' when it packs the experts."""
    if any(".block_sparse_moe." in name for name in names):
        return FfnNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")
    return DEFAULT_NAMES


FAMILY = Family("mixtral", read, ffn_names)
