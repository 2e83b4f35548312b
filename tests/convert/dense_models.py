"""Small dense models of the four families, made and saved by transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from support.bigram_engine import write_byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

INNER = 64
LAYERS = 3
CONTEXT = 96
ONLY = {
    "llama": {"mlp_bias": False, "attention_bias": False},
    "mistral": {"sliding_window": None, "head_dim": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "attention_bias": False},
}


def save_dense(
    path: Path, model_type: str, seed: int, dtype: torch.dtype = torch.float32, **given: Any
) -> PreTrainedModel:
    """A model in which no parameter has the value it was born with."""
    rng = random.Random(seed)
    path.mkdir(exist_ok=True)
    write_byte_tokenizer(path)
    scaling = rng.choice(["default", "linear", "llama3", "yarn"])
    rope: dict[str, Any] = {"rope_type": scaling, "rope_theta": 5000.0}
    if scaling != "default":
        rope |= {"factor": 2.0}
    if scaling in ("llama3", "yarn"):
        rope |= {"original_max_position_embeddings": 32}
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": rng.random() < 0.5,
        "rope_parameters": rope,
        **ONLY[model_type],
        **given,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.3 * noise
        elif tensor.dim() == 1:
            value = 0.3 * noise
        elif "embed_tokens" in name:
            value = noise
        else:
            value = 1.2 * noise * tensor.shape[-1] ** -0.5
        tensor.data.copy_(value)
    model = model.to(dtype).eval()
    model.save_pretrained(path)
    return model


def edit_config(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
