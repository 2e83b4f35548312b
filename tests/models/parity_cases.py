"""Small random models of every family, made, saved and run by transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

CONTEXT = 256
VOCAB = 96

Config = dict[str, Any]


def rope_parameters(rng: random.Random, kinds: Sequence[str]) -> Config:
    """A random rotary embedding whose scaling shows within a hundred positions."""
    kind = rng.choice(kinds)
    rope: Config = {"rope_type": kind, "rope_theta": rng.choice([10_000.0, 500.0])}
    if kind != "default":
        rope["factor"] = rng.choice([2.0, 4.0])
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = 32
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn":
        rope |= rng.choice(
            [
                {},
                {"truncate": False},
                {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0},
                {"mscale": 0.7, "mscale_all_dim": 1.1},
            ]
        )
    return rope


ALL_ROPES = ("default", "linear", "dynamic", "llama3", "yarn")


def grouped(rng: random.Random) -> Config:
    """Heads of grouped-query attention, with hidden_size / heads as head_dim."""
    heads, kv_heads = rng.choice([(4, 2), (4, 1), (2, 2), (6, 2)])
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * rng.choice([8, 16]),
    }


def routed(rng: random.Random, experts_name: str) -> Config:
    experts = rng.choice([5, 8])
    return {experts_name: experts, "num_experts_per_tok": rng.randint(1, 3)}


def llama(rng: random.Random) -> Config:
    return grouped(rng) | {
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "head_dim": rng.choice([None, 12]),
        "hidden_act": rng.choice(["silu", "gelu", "gelu_pytorch_tanh"]),
        "rope_parameters": rope_parameters(rng, ALL_ROPES),
    }


def mistral(rng: random.Random) -> Config:
    return grouped(rng) | {
        "head_dim": rng.choice([8, 12]),
        "sliding_window": rng.choice([None, 7, 40]),
        "rope_parameters": rope_parameters(rng, ALL_ROPES),
    }


def qwen2(rng: random.Random) -> Config:
    return grouped(rng) | {
        "use_sliding_window": rng.random() < 0.7,
        "sliding_window": rng.choice([5, 17]),
        "max_window_layers": rng.choice([0, 1]),
        "rope_parameters": rope_parameters(rng, ALL_ROPES),
    }


def qwen3(rng: random.Random) -> Config:
    slides = rng.random() < 0.7
    return grouped(rng) | {
        "head_dim": rng.choice([8, 20]),
        "attention_bias": rng.random() < 0.5,
        "use_sliding_window": slides,
        "sliding_window": rng.choice([5, 17]),
        "max_window_layers": rng.choice([0, 1]),
        "rope_parameters": rope_parameters(rng, ALL_ROPES),
    }


def mixtral(rng: random.Random) -> Config:
    rope = rope_parameters(rng, ALL_ROPES)
    # transformers itself cannot make these two from a head_dim of null
    head_dims = [12] if rope["rope_type"] in ("dynamic", "yarn") else [None, 12]
    return (
        grouped(rng)
        | routed(rng, "num_local_experts")
        | {
            "sliding_window": rng.choice([None, 7, 40]),
            "head_dim": rng.choice(head_dims),
            "rope_parameters": rope,
        }
    )


def qwen_layers(rng: random.Random) -> Config:
    return {
        "moe_intermediate_size": 20,
        "norm_topk_prob": rng.random() < 0.5,
        "decoder_sparse_step": rng.choice([1, 2]),
        "mlp_only_layers": rng.choice([[], [1]]),
        "num_hidden_layers": 4,
    }


def qwen2_moe(rng: random.Random) -> Config:
    return (
        grouped(rng)
        | routed(rng, "num_experts")
        | qwen_layers(rng)
        | {
            "shared_expert_intermediate_size": 28,
            "qkv_bias": rng.random() < 0.7,
            "use_sliding_window": rng.random() < 0.5,
            "sliding_window": rng.choice([5, 17]),
            "max_window_layers": rng.choice([2, 4]),
            "rope_parameters": rope_parameters(rng, ALL_ROPES),
        }
    )


def qwen3_moe(rng: random.Random) -> Config:
    return (
        grouped(rng)
        | routed(rng, "num_experts")
        | qwen_layers(rng)
        | {
            "head_dim": rng.choice([8, 20]),
            "attention_bias": rng.random() < 0.5,
            "use_sliding_window": rng.random() < 0.4,
            "sliding_window": 9,
            "rope_parameters": rope_parameters(rng, ALL_ROPES),
        }
    )


def olmoe(rng: random.Random) -> Config:
    return (
        grouped(rng)
        | routed(rng, "num_experts")
        | {
            "clip_qkv": rng.choice([None, 0.8]),
            "attention_bias": rng.random() < 0.5,
            "norm_topk_prob": rng.random() < 0.5,
            "eos_token_id": None,
            "rope_parameters": rope_parameters(rng, ALL_ROPES),
        }
    )


def latent(rng: random.Random) -> Config:
    heads = rng.choice([2, 4])
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": 32,
        "q_lora_rank": rng.choice([None, 20]),
        "kv_lora_rank": rng.choice([12, 24]),
        "qk_nope_head_dim": rng.choice([8, 12]),
        "qk_rope_head_dim": rng.choice([4, 8]),
        "v_head_dim": rng.choice([6, 10]),
        "attention_bias": rng.random() < 0.3,
        "moe_intermediate_size": 20,
        "n_shared_experts": rng.choice([1, 2]),
        "first_k_dense_replace": rng.choice([0, 1]),
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "num_experts_per_tok": rng.randint(1, 3),
        "rope_parameters": rope_parameters(rng, ("default", "yarn", "yarn")),
    }


def deepseek_v2(rng: random.Random) -> Config:
    limited = rng.random() < 0.5
    return latent(rng) | {
        "n_routed_experts": 8,
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "n_group": 4 if limited else None,
        "topk_group": 2 if limited else None,
        "mlp_bias": False,
    }


def deepseek_v3(rng: random.Random) -> Config:
    groups, top = rng.choice([(1, 1), (4, 2), (2, 1)])
    return latent(rng) | {
        "n_routed_experts": 8,
        "n_group": groups,
        "topk_group": top,
        "norm_topk_prob": rng.random() < 0.5,
        "rope_interleave": rng.random() < 0.7,
    }


def glm4_moe(rng: random.Random) -> Config:
    groups, top = rng.choice([(1, 1), (4, 2)])
    return grouped(rng) | {
        "head_dim": rng.choice([8, 16]),
        "rope_parameters": rope_parameters(rng, ("default", "linear", "yarn"))
        | {"partial_rotary_factor": rng.choice([0.5, 0.25, 1.0])},
        "attention_bias": rng.random() < 0.5,
        "use_qk_norm": rng.random() < 0.5,
        "moe_intermediate_size": 20,
        "n_routed_experts": 8,
        "n_group": groups,
        "topk_group": top,
        "n_shared_experts": rng.choice([1, 2]),
        "first_k_dense_replace": rng.choice([0, 1]),
        "norm_topk_prob": rng.random() < 0.5,
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "num_experts_per_tok": rng.randint(1, 3),
    }


def gpt_oss(rng: random.Random) -> Config:
    return (
        grouped(rng)
        | routed(rng, "num_local_experts")
        | {
            "head_dim": rng.choice([8, 16]),
            "hidden_size": 32,
            "intermediate_size": 32,
            "sliding_window": rng.choice([5, 33]),
            "attention_bias": rng.random() < 0.7,
            "swiglu_limit": rng.choice([7.0, 0.5]),
            "rope_parameters": rope_parameters(rng, ("yarn", "default", "yarn")),
        }
    )


DRAW = {
    function.__name__: function
    for function in (
        mixtral,
        qwen2_moe,
        qwen3_moe,
        olmoe,
        deepseek_v2,
        deepseek_v3,
        glm4_moe,
        gpt_oss,
        llama,
        mistral,
        qwen2,
        qwen3,
    )
}


def draw_config(model_type: str, seed: int) -> Config:
    """A random config of a family, as keyword arguments of its transformers config."""
    rng = random.Random(f"{model_type} {seed}")
    common = {
        "vocab_size": VOCAB,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.3,
        "pad_token_id": None,
    }
    return common | DRAW[model_type](rng)


def make_reference(config: Config, model_type: str, seed: int) -> PreTrainedModel:
    """A transformers model in which no parameter or buffer has the value it was born with."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    generator = torch.Generator().manual_seed(seed)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in state.items():
        if "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.3 * noise
        elif tensor.dim() == 1 or name.endswith("_bias"):
            value = 0.3 * noise  # biases, sinks, correction biases
        elif "embed_tokens" in name:
            value = noise
        else:
            value = 1.5 * noise * tensor.shape[-1] ** -0.5
        tensor.data.copy_(value)
    return model.eval()


def save(model: PreTrainedModel, path: Path, *, packed: bool, old_style: bool) -> None:
    """One tensor per expert or packed; config.json as transformers 5 or as the hub has it."""
    model.save_pretrained(path, save_original_format=not packed)
    if old_style:
        file = path / "config.json"
        config = json.loads(file.read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = None if rope == {"type": "default"} else rope
        config["torch_dtype"] = config.pop("dtype")
        config.pop("layer_types", None)  # every one drawn here is the family's default
        file.write_text(json.dumps(config))


def reference_greedy(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy tokens of transformers, with its own kv cache."""
    found: list[int] = []
    inputs, past = torch.tensor([list(prompt)]), None
    with torch.inference_mode():
        for _ in range(num_tokens):
            output = model(inputs, past_key_values=past, use_cache=True)
            past = output.past_key_values
            found.append(int(output.logits[0, -1].argmax()))
            inputs = torch.tensor([found[-1:]])
    return found
