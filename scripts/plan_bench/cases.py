"""What is predicted and measured: three shapes of models, and the configurations of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

OUTPUT_TOKENS = 24
FORMATS = ("none", "int8", "int4")
STREAMS = (1, 4, 16)
CONTEXTS = (64, 256, 768)
#: percent of the experts that have a slot in memory; 100: all resident, without tiers
SHARES = (100, 75, 50, 25)

_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}
#: config.json of each: few large experts; many small ones; a shared one beside the routed
SHAPES: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "few-large": {
            **_COMMON,
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": 1536,
            "intermediate_size": 2560,
            "num_hidden_layers": 5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 32000,
        },
        "many-small": {
            **_COMMON,
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": 1024,
            "intermediate_size": 1024,
            "moe_intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_experts": 48,
            "num_experts_per_tok": 6,
            "norm_topk_prob": True,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 24000,
        },
        "shared": {
            **_COMMON,
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "hidden_size": 1280,
            "intermediate_size": 2048,
            "moe_intermediate_size": 640,
            "shared_expert_intermediate_size": 1920,
            "num_hidden_layers": 8,
            "num_experts": 24,
            "num_experts_per_tok": 4,
            "num_attention_heads": 20,
            "num_key_value_heads": 20,
            "vocab_size": 32000,
        },
    }
)


@dataclass(frozen=True)
class Case:
    """One configuration. context_tokens: of every prompt. share: percent of experts in memory."""

    shape: str
    quantize: str
    num_streams: int
    context_tokens: int
    share: int

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.quantize}-{self.num_streams}x{self.context_tokens}-{self.share}"

    @property
    def model(self) -> str:
        """Cases of one model run one after another: it is written once and then removed."""
        return f"{self.shape}-{self.quantize}"

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


def all_cases() -> list[Case]:
    """Four of each model, every share once: 36. Which streams and contexts go with which share
    follows from a Latin square, so that over all models every pair comes up."""
    cases = []
    for i, shape in enumerate(SHAPES):
        for j, quantize in enumerate(FORMATS):
            for k, share in enumerate(SHARES):
                streams = STREAMS[(i + j + k) % len(STREAMS)]
                context = CONTEXTS[(i + 2 * j + k + k // len(CONTEXTS)) % len(CONTEXTS)]
                cases.append(Case(shape, quantize, streams, context, share))
    return cases


def write_config(shape: str, directory: Path) -> Path:
    """config.json of a shape."""
    path = directory / f"{shape}.json"
    path.write_text(json.dumps(SHAPES[shape], indent=1))
    return path


def num_experts(shape: str) -> int:
    """Of all layers."""
    config = SHAPES[shape]
    per_layer = config.get("num_local_experts") or config["num_experts"]
    return int(per_layer * config["num_hidden_layers"])
