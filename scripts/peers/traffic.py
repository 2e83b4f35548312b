"""What a step must read and multiply: the machine's limit divided by these is the bound."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from random_checkpoint import Qwen3MoeShape

KV_BYTES = 2  # of one kv value: bf16 or fp16
#: Stored bits per weight, scales included, of files whose matrices are all alike. llama.cpp's block
#: formats: 32 (Q4_K: 256) weights with their scales (ggml-common.h).
FILE_BITS = MappingProxyType({"bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "q4_k": 4.5})


@dataclass(frozen=True)
class StoredBits:
    """Bits per weight, scales included, of an engine's matrices in memory."""

    experts: float = 16
    product: float = 16  # attention
    head: float = 16
    router: float = 32


@dataclass(frozen=True)
class Traffic:
    """Weights that are read once per step, and what is computed per token."""

    shape: Qwen3MoeShape

    @property
    def _attention_weights(self) -> int:
        shape = self.shape
        query = shape.num_attention_heads * shape.head_dim
        kv = shape.num_key_value_heads * shape.head_dim
        return shape.hidden_size * (2 * query + 2 * kv)

    @property
    def expert_weights(self) -> int:
        return 3 * self.shape.hidden_size * self.shape.moe_intermediate_size

    def uniform_experts(self, num_rows: int) -> float:
        """Expected distinct experts in a layer where each row picks K of E uniformly."""
        shape = self.shape
        untouched = (1 - shape.num_experts_per_tok / shape.num_experts) ** num_rows
        return shape.num_experts * (1 - untouched)

    def step_bytes(
        self, bits: StoredBits, num_experts: float, num_streams: int, context_tokens: float
    ) -> float:
        """Bytes of one decode step: every weight in use once, and the streams' kv."""
        return sum(self.part_bytes(bits, num_experts, num_streams, context_tokens).values())

    def part_bytes(
        self, bits: StoredBits, num_experts: float, num_streams: int, context_tokens: float
    ) -> dict[str, float]:
        """The same by part, named as the kernels' part times are.

        num_experts: distinct experts per layer. Of the embedding a step reads single rows.
        """
        shape = self.shape
        layers = shape.num_hidden_layers
        experts = layers * num_experts * self.expert_weights * bits.experts / 8
        kv_values = 2 * shape.num_key_value_heads * shape.head_dim * layers
        return {
            "projections": layers * self._attention_weights * bits.product / 8,
            "attention": num_streams * context_tokens * kv_values * KV_BYTES,
            "router": layers * shape.num_experts * shape.hidden_size * bits.router / 8,
            "gate, up": experts * 2 / 3,
            "down": experts / 3,
            "rest": shape.hidden_size * shape.vocab_size * bits.head / 8,
        }

    def prefill_ops(self, num_tokens: int) -> float:
        """Multiplications and additions of a prompt: all rows but the head, which sees the last."""
        return sum(self.part_ops(num_tokens).values())

    def part_ops(self, num_tokens: int) -> dict[str, float]:
        """The same by part, named as the kernels' part times are."""
        shape = self.shape
        rows = 2.0 * shape.num_hidden_layers * num_tokens
        experts = rows * shape.num_experts_per_tok * self.expert_weights
        return {
            "projections": rows * self._attention_weights,
            # Causal: a row meets half of the tokens on average, in scores and in sums of values.
            "attention": rows * num_tokens * shape.num_attention_heads * shape.head_dim,
            "router": rows * shape.num_experts * shape.hidden_size,
            "gate, up": experts * 2 / 3,
            "down": experts / 3,
            "rest": 2.0 * shape.hidden_size * shape.vocab_size,
        }

    def layer_bytes(self, bits: float, num_experts: float) -> float:
        return num_experts * self.expert_weights * bits / 8
