"""A model as its sizes, without its weights: what plans and costs are computed from. Values only;
model_shape.py makes them from a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from moeserve.core import ExpertSpec

#: of one number of a compute dtype
NUMBER_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})


@dataclass(frozen=True)
class Matrix:
    """One product of a layer: [rows, cols] weights as they are stored.

    form: `PackFormat.describe()` or the dtype of plain weights. num_bytes: as stored. packed: for
    the native kernels, in memory of its own. per_head: each head has weights of its own, and torch
    multiplies them (latent attention). ffn: gate, up and down of a dense FFN or a shared expert,
    which are stored and computed as one expert.
    """

    name: str
    rows: int
    cols: int
    form: str
    num_bytes: int
    packed: bool = True
    per_head: bool = False
    ffn: bool = False

    @property
    def read_bytes(self) -> int:
        """What a product reads: of a tied head that is stored once, the embedding."""
        return self.num_bytes or self.rows * self.cols * NUMBER_BYTES[self.form]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """num_heads: of queries. score_width: numbers of a key that a query meets. value_width: of a
    value. kv_heads, kv_width: numbers that one token leaves in the kv pool are their product.
    window: keys a query sees; None: all before it."""

    num_heads: int
    score_width: int
    value_width: int
    kv_heads: int
    kv_width: int
    window: int | None

    def keys(self, position_tokens: int) -> int:
        """Keys that a query at the end of so many tokens sees."""
        return position_tokens if self.window is None else min(position_tokens, self.window)


@dataclass(frozen=True, kw_only=True)
class ExpertsShape:
    """The routed experts of one layer. form: of gate and up, and of down where they agree.
    record_bytes: of one expert, in every tier."""

    spec: ExpertSpec
    top_k: int
    form: str
    record_bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """products: everything that every token is multiplied with: attention, router, dense FFN,
    shared experts. other_bytes: norms, biases. experts: None in a dense layer."""

    index: int
    attention: AttentionShape
    products: tuple[Matrix, ...]
    other_bytes: int
    experts: ExpertsShape | None


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model as its sizes. dtype: of computation and kv. context_tokens: the model's own limit.
    embedding_bytes, other_bytes: beside the layers. head: stored apart also where it is tied.
    native: whether weights are packed for the native kernels; else they are tensors.
    packed: whether they come from a `moeserve pack` directory, mapped."""

    name: str
    path: Path
    model_type: str
    dtype: str
    hidden_size: int
    vocab_size: int
    context_tokens: int
    num_parameters: int
    embedding_bytes: int
    other_bytes: int
    head: Matrix
    layers: tuple[LayerShape, ...]
    native: bool = True
    packed: bool = False

    @property
    def number_bytes(self) -> int:
        """Of one number of the compute dtype."""
        return NUMBER_BYTES[self.dtype]

    @property
    def kv_token_bytes(self) -> int:
        """kv of one token in all layers."""
        numbers = sum(s.attention.kv_heads * s.attention.kv_width for s in self.layers)
        return numbers * self.number_bytes

    @property
    def expert_bytes(self) -> int:
        """All routed experts of all layers."""
        return sum(
            s.experts.record_bytes * s.experts.spec.num_experts
            for s in self.layers
            if s.experts is not None
        )

    @property
    def num_experts(self) -> int:
        """Routed experts of all layers."""
        return sum(s.experts.spec.num_experts for s in self.layers if s.experts is not None)

    @property
    def rest_bytes(self) -> int:
        """All weights but routed experts."""
        layers = sum(s.other_bytes + sum(m.num_bytes for m in s.products) for s in self.layers)
        return self.embedding_bytes + self.other_bytes + self.head.num_bytes + layers
