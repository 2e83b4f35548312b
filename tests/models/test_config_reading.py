"""Which config.json is read, as what, and which fields are refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moeserve.config import ExpertConfig, ModelConfig
from moeserve.core import ConfigError, ModelError
from moeserve.models.families import FAMILIES
from moeserve.models.kv_pool import KvPool
from moeserve.models.registry import load_model
from moeserve.models.rope import inverse_frequencies
from moeserve.models.spec import (
    AttentionSpec,
    LongRopeScaling,
    MlaSpec,
    ModelSpec,
    MoeFfnSpec,
    YarnScaling,
)

# What the hub's config.json of these models says (their model cards and technical reports).
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
HUB = {config["model_type"]: config for config in (MIXTRAL_8X7B, DEEPSEEK_V3, GPT_OSS_20B)}


def read(config: dict[str, Any]) -> ModelSpec:
    return FAMILIES[config["model_type"]].spec(config)


def test_mixtral_of_the_hub() -> None:
    spec = read(MIXTRAL_8X7B)
    layer = spec.layers[31]
    assert isinstance(layer.attention, AttentionSpec)
    assert isinstance(layer.ffn, MoeFfnSpec)
    assert (spec.num_layers, spec.num_moe_layers, spec.num_experts) == (32, 32, 8)
    assert (layer.attention.rope.theta, layer.attention.rope.dim) == (1e6, 128)
    assert layer.ffn.router.normalize
    # 2 (k, v) * 8 heads * 128 * 32 layers * 2 bytes
    assert KvPool.bytes_per_block(spec, 16, torch.bfloat16) == 16 * 131072


def test_deepseek_v3_of_the_hub() -> None:
    spec = read(DEEPSEEK_V3)
    attention = spec.layers[0].attention
    assert isinstance(attention, MlaSpec)
    assert (spec.num_layers, spec.num_moe_layers, spec.num_prediction_layers) == (61, 58, 1)
    # DeepSeek's own code: 192 ** -0.5 * (0.1 * ln 40 + 1) ** 2
    assert attention.scale == pytest.approx(0.0721687836 * 1.3688879454**2)
    assert isinstance(attention.rope.scaling, YarnScaling)
    assert attention.rope.scaling.attention_factor == 1.0
    assert attention.kv_shape == (1, 576)
    assert spec.quantization_block == (128, 128)


def test_gpt_oss_of_the_hub() -> None:
    spec = read(GPT_OSS_20B)
    attentions = [layer.attention for layer in spec.layers]
    assert [a.window for a in attentions if isinstance(a, AttentionSpec)] == [128, None] * 12
    assert spec.num_experts == 32


@pytest.mark.parametrize("model_type", sorted(HUB))
def test_frequencies_are_those_of_transformers(model_type: str) -> None:
    config = AutoConfig.for_model(**HUB[model_type])
    rope = read(HUB[model_type]).layers[0].attention.rope
    if config.rope_parameters["rope_type"] == "default":
        rotary = AutoModelForCausalLM.from_config(_shrunk(config)).model.rotary_emb
        expected, factor = rotary.inv_freq, rotary.attention_scaling
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    assert torch.allclose(inverse_frequencies(rope), expected, rtol=1e-6, atol=0)
    scaling = rope.scaling
    ours = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
    assert ours == pytest.approx(factor)


def _shrunk(config: Any) -> Any:
    """As little of the model as keeps its rotary embedding."""
    config.num_hidden_layers, config.vocab_size = 0, 8
    return config


LONG = {
    "type": "longrope",
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 64,
    "long_factor": [2] * 64,
}


def test_long_rope_as_phi_3_has_it() -> None:
    """The original context beside max_position_embeddings, whose ratio gives the amplitude."""
    outside = {name: value for name, value in LONG.items() if name.startswith(("type", "s", "l"))}
    config = MIXTRAL_8X7B | {"rope_scaling": outside, "original_max_position_embeddings": 4096}
    spec = FAMILIES["mixtral"].spec(config)
    assert spec.kv_switch_tokens == 4096
    scaling = spec.layers[0].attention.rope.scaling
    assert isinstance(scaling, LongRopeScaling)
    assert scaling.long_factors == (2.0,) * 64
    assert scaling.attention_factor == math.sqrt(1 + math.log(32768 / 4096) / math.log(4096))


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        ("mixtral", {"alibi": True}, "alibi=True"),
        ("mixtral", {"attention_bias": True}, "attention_bias=True"),
        ("mixtral", {"hidden_act": "xielu"}, "hidden_act: 'xielu'"),
        ("mixtral", {"num_key_value_heads": 5}, "num_key_value_heads: 5"),
        ("mixtral", {"hidden_size": "4096"}, "hidden_size: '4096'"),
        ("mixtral", {"hidden_size": True}, "hidden_size: True"),
        ("mixtral", {"num_hidden_layers": 0}, "num_hidden_layers: 0"),
        ("mixtral", {"vocab_size": None}, "vocab_size: missing"),
        ("mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps: nan"),
        ("mixtral", {"num_experts_per_tok": 9}, "top_k: 9"),
        ("mixtral", {"rope_theta": 1.0}, "rope_theta: 1.0"),
        (
            "mixtral",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "high_freq_factor: 4",
        ),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ("mixtral", {"rope_scaling": {"type": "spiral", "factor": 2}}, "type: 'spiral'"),
        ("mixtral", {"rope_scaling": {"type": "longrope"}}, "original_max_position_embeddings"),
        (
            "mixtral",
            {"rope_scaling": LONG | {"short_factor": [1.0]}},
            "short_factor.*numbers above",
        ),
        ("mixtral", {"rope_scaling": LONG | {"long_factor": [1, "2"]}}, "long_factor.*numbers"),
        ("mixtral", {"rope_scaling": LONG | {"long_mscale": 1.2}}, "rope_scaling.*long_mscale=1.2"),
        ("mixtral", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor: missing"),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, "rope_scaling.*x=1"),
        ("mixtral", {"rope_scaling": 3}, "rope_scaling: 3"),
        ("mixtral", {"quantization_config": {"quant_method": "gptq"}}, "quant_method: 'gptq'"),
        ("mixtral", {"quantization_config": {"quant_method": "mxfp4"}}, "quant_method: 'mxfp4'"),
        ("mixtral", {"quantization_config": {"bits": 4}}, "quant_method: missing"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: 'softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method: 'greedy'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq: 2"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads: 8"),
        ("deepseek_v3", {"n_group": 7}, "num_groups: 7"),
        ("deepseek_v3", {"qk_rope_head_dim": 63}, "63 dimensions"),
        ("deepseek_v3", {"index_topk": 2048}, "index_topk=2048"),
        (
            "deepseek_v3",
            {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
            "activation_scheme: 'static'",
        ),
        (
            "deepseek_v3",
            {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}},
            "weight_block_size",
        ),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ("gpt_oss", {"experts_per_token": 2}, "experts_per_token: 2"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "num_hidden_layers"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 24}, "implemented: full_attention"),
        ("gpt_oss", {"sliding_window": None}, "need a sliding_window"),
    ],
)
def test_refused_by_name(base: str, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read(HUB[base] | change)


def test_two_names_that_differ() -> None:
    with pytest.raises(ModelError, match="num_nextn_predict_layers says 1"):
        read(DEEPSEEK_V3 | {"num_mtp_layers": 2})


def test_deepseek_v2_routing_that_is_not_settled() -> None:
    config = {
        key: value
        for key, value in DEEPSEEK_V3.items()
        if key not in ("num_nextn_predict_layers", "quantization_config")
    } | {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy"}
    assert read(config | {"norm_topk_prob": False}).num_experts == 256
    with pytest.raises(ModelError, match="norm_topk_prob: True"):
        read(config)
    limited = {"norm_topk_prob": False, "topk_method": "group_limited_greedy", "n_group": None}
    with pytest.raises(ModelError, match="needs n_group"):
        read(config | limited)


def test_settings_that_do_not_fit_the_bundled_model() -> None:
    experts = ExpertConfig()
    with pytest.raises(ConfigError, match="context_tokens: 9999999 is above"):
        load_model(ModelConfig(context_tokens=9999999), experts)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device: 'cuda:7' cannot be used"):
            load_model(ModelConfig(device="cuda:7"), experts)
    loaded = load_model(ModelConfig(context_tokens=100), experts)
    assert loaded.context_tokens == 100
    assert "config.json" in loaded.notes["dtype"]
