"""DeepSeek-V2 (arXiv:2405.04434): latent attention, shared experts, group-limited routing."""

from __future__ import annotations

from moeserve.core import ExpertSpec
from moeserve.experts.router import RouterSpec
from moeserve.models.config_reader import ConfigReader
from moeserve.models.config_sections import read_activation, read_frame, read_mla
from moeserve.models.family import Family
from moeserve.models.spec import (
    DenseFfnSpec,
    LayerSpec,
    ModelSpec,
    MoeFfnSpec,
    SharedExpertSpec,
)


def read(reader: ConfigReader) -> ModelSpec:
    attention = read_mla(reader, pairs_adjacent=True)
    dense = DenseFfnSpec(
        intermediate_size=reader.integer("intermediate_size"),
        activation=read_activation(reader),
        bias=reader.flag("mlp_bias", default=False),
    )
    moe = _read_moe(reader, dense)
    num_dense = reader.integer("first_k_dense_replace", default=0, at_least=0)
    reader.only("moe_layer_freq", 1)
    layers = [
        LayerSpec(attention=attention, ffn=dense if layer < num_dense else moe)
        for layer in range(reader.integer("num_hidden_layers"))
    ]
    return read_frame(reader, layers, norm_eps=1e-6)


def _read_moe(reader: ConfigReader, dense: DenseFfnSpec) -> MoeFfnSpec:
    hidden, experts = reader.integer("hidden_size"), reader.integer("n_routed_experts", default=64)
    inner = reader.integer("moe_intermediate_size", default=1407)
    shared = inner * reader.integer("n_shared_experts", default=2)
    limited = reader.choice(
        "topk_method", {"greedy": False, "group_limited_greedy": True}, default="greedy"
    )
    num_groups = reader.optional_integer("n_group")
    top_groups = reader.optional_integer("topk_group")
    if limited and (num_groups is None or top_groups is None):
        raise reader.refusal("topk_method", "needs n_group and topk_group")
    reader.only("scoring_func", "softmax")
    # DeepSeek's code and transformers' differ in what they do with it.
    reader.only("norm_topk_prob", False, why="its meaning in this family is not settled")
    return MoeFfnSpec(
        router=RouterSpec(
            num_experts=experts,
            top_k=reader.integer("num_experts_per_tok"),
            hidden_size=hidden,
            float32_logits=True,
            scale=reader.number("routed_scaling_factor", default=1.0),
            num_groups=(num_groups or 1) if limited else 1,
            top_groups=(top_groups or 1) if limited else 1,
        ),
        experts=ExpertSpec(
            num_experts=experts,
            hidden_size=hidden,
            intermediate_size=inner,
            activation=dense.activation,
        ),
        shared=SharedExpertSpec(
            ffn=DenseFfnSpec(intermediate_size=shared, activation=dense.activation, bias=dense.bias)
        ),
    )


FAMILY = Family("deepseek_v2", read)
