"""A training-side Qwen3, dense or with experts: small, dropout-capable, with the hub's names.

The state dict is the hub checkpoint (one tensor per expert matrix), so export is a cast and a save.
`export.verify` asserts that transformers computes the same logits from the exported directory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Sizes(ABC):
    """What dense models and those with experts have in common, under Hugging Face's names."""

    vocab_size: int = 3072
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @abstractmethod
    def make_ffn(self) -> nn.Module:
        """x [T, H] -> y [T, H] and the router's logits and choices, or None."""

    def to_hf(self, eos_token_id: int) -> dict[str, Any]:
        """Return the config.json of a checkpoint with these sizes."""
        return asdict(self) | {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "dtype": "float32",
            "eos_token_id": eos_token_id,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rope_scaling": None,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_cache": True,
            "use_sliding_window": False,
        }


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Sizes):
    """A `qwen3_moe` model: experts in every layer."""

    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 64

    def make_ffn(self) -> nn.Module:
        return MoE(self)

    def to_hf(self, eos_token_id: int) -> dict[str, Any]:
        return super().to_hf(eos_token_id) | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "decoder_sparse_step": 1,
            # No dense layer exists; the field is part of the format.
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
        }


@dataclass(frozen=True, kw_only=True)
class DenseConfig(Sizes):
    """A dense `qwen3` model: the test bed of `moeserve convert`."""

    hidden_size: int = 256
    num_attention_heads: int = 8
    intermediate_size: int = 1024

    def make_ffn(self) -> nn.Module:
        return DenseFfn(self.hidden_size, self.intermediate_size)

    def to_hf(self, eos_token_id: int) -> dict[str, Any]:
        return super().to_hf(eos_token_id) | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
        }


def read_config(values: dict[str, Any]) -> ModelConfig | DenseConfig:
    """The inverse of dataclasses.asdict."""
    return DenseConfig(**values) if "intermediate_size" in values else ModelConfig(**values)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding in the half-split layout; x: [B, heads, S, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query causal attention with per-head norm of queries and keys."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        self.head_dim = dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, hidden, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class GatedFfn(nn.Module):
    """down(silu(gate(x)) * up(x)): an expert, or the FFN of a dense model."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DenseFfn(GatedFfn):
    """The FFN of a dense layer, in the place of experts: it routes nothing."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class MoE(nn.Module):
    """Softmax router and its experts; tokens are grouped by expert, so no work is padding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.experts = nn.ModuleList(GatedFfn(hidden, inner) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output [T, H], the router logits [T, E] and the chosen experts [T, K]."""
        logits = self.gate(x)
        weights, ids = logits.softmax(-1).topk(self.top_k, dim=-1)  # [T, K]
        weights = weights / weights.sum(-1, keepdim=True)
        order = ids.flatten().argsort(stable=True)  # [T*K], grouped by expert
        tokens = order // self.top_k
        counts = torch.bincount(ids.flatten(), minlength=len(self.experts)).tolist()
        groups = torch.split(x.index_select(0, tokens), counts)
        y = torch.cat([expert(g) for expert, g in zip(self.experts, groups, strict=True)])
        y = y * weights.flatten().index_select(0, order).unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, tokens, y), (logits, ids)


class Layer(nn.Module):
    """Pre-norm attention and FFN or MoE with residual dropout."""

    def __init__(self, config: Sizes, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = config.make_ffn()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        y, routing = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + self.dropout(y.view_as(x)), routing


class Backbone(nn.Module):
    """Embedding, layers and final norm; named `model` in the checkpoint."""

    def __init__(self, config: Sizes, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


@dataclass(frozen=True)
class Output:
    """Logits [B, S, V]; per MoE layer the router logits [T, E] and the chosen experts [T, K]."""

    logits: Tensor
    router_logits: list[Tensor]
    expert_ids: list[Tensor]


class TinyModel(nn.Module):
    """The whole model; the output head is the embedding."""

    def __init__(self, config: ModelConfig | DenseConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config, dropout)
        self.dropout = nn.Dropout(dropout)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights; the matrices that write to the residual stream start smaller."""
        residual_scale = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.04 * (residual_scale if is_residual else 1.0))

    def forward(self, token_ids: Tensor) -> Output:
        config = self.config
        steps = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        angles = torch.arange(token_ids.shape[1]).float()[:, None] * config.rope_theta**-steps
        angles = torch.cat((angles, angles), dim=-1)  # [S, D]
        cos, sin = angles.cos(), angles.sin()
        x = self.dropout(self.model.embed_tokens(token_ids))
        router_logits, expert_ids = [], []
        for layer in self.model.layers:
            x, routing = layer(x, cos, sin)
            if routing is not None:
                router_logits.append(routing[0])
                expert_ids.append(routing[1])
        head = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return Output(head, router_logits, expert_ids)


def balance_loss(output: Output) -> Tensor:
    """Switch-style load-balancing loss, per layer: 1 when every expert is equally used."""
    losses = []
    for logits, ids in zip(output.router_logits, output.expert_ids, strict=True):
        num_experts = logits.shape[-1]
        share = torch.bincount(ids.flatten(), minlength=num_experts) / ids.numel()
        losses.append(num_experts * (share * logits.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def z_loss(output: Output) -> Tensor:
    """Mean squared log-partition of the router: keeps its logits small."""
    return torch.stack([z.logsumexp(-1).square().mean() for z in output.router_logits]).mean()
