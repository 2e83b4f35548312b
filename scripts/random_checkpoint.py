"""A checkpoint of random weights in the shape of a real qwen3_moe model, for benchmarks.

Speed depends on shapes and not on values, as long as the router spreads its tokens: random router
rows do. The names are those of the published checkpoints, one tensor per expert, so that loading
goes the way it goes for a real model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

INDEX_FILE = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Qwen3MoeShape:
    """The sizes of a qwen3_moe model, named as in its config.json."""

    num_hidden_layers: int
    hidden_size: int = 2048
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int = 128
    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    vocab_size: int = 151_936

    @property
    def expert_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.moe_intermediate_size
        return {
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors of one layer, by their names below `model.layers.N.`."""
        hidden, dim = self.hidden_size, self.head_dim
        query, kv = self.num_attention_heads * dim, self.num_key_value_heads * dim
        experts = {
            f"mlp.experts.{expert}.{name}.weight": shape
            for expert in range(self.num_experts)
            for name, shape in self.expert_shapes.items()
        }
        return {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, query),
            "self_attn.q_norm.weight": (dim,),
            "self_attn.k_norm.weight": (dim,),
            "mlp.gate.weight": (self.num_experts, hidden),
            **experts,
        }

    @property
    def num_layer_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.layer_shapes().values())

    @property
    def num_parameters(self) -> int:
        ends = (2 * self.vocab_size + 1) * self.hidden_size
        return self.num_hidden_layers * self.num_layer_parameters + ends

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token is multiplied with: all but the idle experts and the embedding.

        A decode step of one sequence reads them all once, which bounds its speed.
        """
        expert = sum(math.prod(shape) for shape in self.expert_shapes.values())
        idle = self.num_hidden_layers * (self.num_experts - self.num_experts_per_tok) * expert
        return self.num_parameters - idle - self.vocab_size * self.hidden_size


def write_random_checkpoint(
    path: Path,
    shape: Qwen3MoeShape,
    device: torch.device,
    seed: int = 0,
    embedding_std: float = WEIGHT_STD,
) -> None:
    """Writes config.json and bfloat16 weights, one shard per layer. The device draws them.

    embedding_std: at 1 the last token decides what comes next; at WEIGHT_STD the layers add more
    to the stream than the embedding brings, and greedy text soon repeats one token.
    """
    path.mkdir(parents=True)
    config = Qwen3MoeConfig(
        **asdict(shape),
        intermediate_size=shape.moe_intermediate_size,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        eos_token_id=0,
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(path)
    generator = torch.Generator(device).manual_seed(seed)
    shards = dict(_shards(shape))
    location: dict[str, str] = {}
    for number, shapes in enumerate(shards.values(), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: _draw(size, embedding_std if name == EMBEDDING else WEIGHT_STD, device, generator)
            for name, size in shapes.items()
        }
        save_file(tensors, path / file, metadata={"format": "pt"})
        location.update(dict.fromkeys(tensors, file))
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": location}))


def _shards(shape: Qwen3MoeShape) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Shard -> tensor name -> shape."""
    table = (shape.vocab_size, shape.hidden_size)
    yield (
        "ends",
        {
            EMBEDDING: table,
            "model.norm.weight": (shape.hidden_size,),
            "lm_head.weight": table,
        },
    )
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield prefix, {prefix + name: size for name, size in shape.layer_shapes().items()}


def _draw(
    size: tuple[int, ...], std: float, device: torch.device, generator: torch.Generator
) -> Tensor:
    if len(size) == 1:  # the norms
        return torch.ones(size, dtype=torch.bfloat16)
    weight = torch.empty(size, dtype=torch.bfloat16, device=device)
    return weight.normal_(0.0, std, generator=generator).cpu()
