"""DeepSeek-V3 (arXiv:2412.19437): sigmoid scores, a correction bias that only chooses, groups."""

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
    adjacent = reader.flag("rope_interleave", default=True)
    attention = read_mla(reader, pairs_adjacent=adjacent)
    dense = DenseFfnSpec(
        intermediate_size=reader.integer("intermediate_size"), activation=read_activation(reader)
    )
    moe = read_sigmoid_moe(reader, dense.activation, num_groups=8, top_groups=4, scale=2.5)
    num_dense = reader.integer("first_k_dense_replace", default=3, at_least=0)
    reader.only("moe_layer_freq", 1)
    reader.only("scoring_func", "sigmoid")
    reader.only("topk_method", "noaux_tc")
    layers = [
        LayerSpec(attention=attention, ffn=dense if layer < num_dense else moe)
        for layer in range(reader.integer("num_hidden_layers"))
    ]
    return read_frame(reader, layers, norm_eps=1e-6, num_prediction_layers=1)


def read_sigmoid_moe(
    reader: ConfigReader, activation: str, *, num_groups: int, top_groups: int, scale: float
) -> MoeFfnSpec:
    """The MoE layer that DeepSeek-V3 and GLM-4.5 share; their defaults differ."""
    hidden = reader.integer("hidden_size")
    experts = reader.integer("n_routed_experts", "num_local_experts")
    inner = reader.integer("moe_intermediate_size")
    shared = inner * reader.integer("n_shared_experts", default=1)
    return MoeFfnSpec(
        router=RouterSpec(
            num_experts=experts,
            top_k=reader.integer("num_experts_per_tok", default=8),
            hidden_size=hidden,
            score="sigmoid",
            float32_logits=True,
            normalize=reader.flag("norm_topk_prob", default=True),
            normalize_eps=1e-20,
            scale=reader.number("routed_scaling_factor", default=scale),
            num_groups=reader.integer("n_group", default=num_groups),
            top_groups=reader.integer("topk_group", default=top_groups),
            group_score="top2_sum",
            correction_bias=True,
        ),
        experts=ExpertSpec(
            num_experts=experts,
            hidden_size=hidden,
            intermediate_size=inner,
            activation=activation,
        ),
        shared=SharedExpertSpec(ffn=DenseFfnSpec(intermediate_size=shared, activation=activation)),
    )


FAMILY = Family("deepseek_v3", read)
