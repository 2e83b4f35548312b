"""What a model computes, as data: read from config.json by a family, built by transformer.py.

One vocabulary for all families. A checkpoint layout that differs only in the order of rows (rotary
pairs side by side, packed experts) is no part of it: the weight rules bring every checkpoint into
the one order that the layers compute with.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from moeserve.core import ExpertSpec
from moeserve.experts.router import RouterSpec


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies divided by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071, section 3.2): high frequencies kept, low ones divided by `factor`.

    attention_factor multiplies cos and sin (the paper's temperature, section 3.4).
    mscale_all_dim: DeepSeek's share of the temperature that goes to the softmax scale; 0: none.
    truncate: whether the bounds of the ramp between both are rounded to whole dimensions.
    """

    factor: float
    original_context_tokens: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: wavelengths above a bound divided by `factor`, with a smooth passage."""

    factor: float
    original_context_tokens: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (arXiv:2402.13753, section 3.2): a divisor for each frequency, found by search.

    short_factors, long_factors: [dim/2] each; all positions of a sequence turn by the short ones up
    to original_context_tokens tokens and by the long ones beyond, so that kv of the one length is
    of no use to the other. attention_factor multiplies cos and sin.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_context_tokens: int
    attention_factor: float


RopeScaling: TypeAlias = LinearScaling | YarnScaling | Llama3Scaling | LongRopeScaling


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (arXiv:2104.09864) of `dim` dimensions of a head.

    Dimension i turns with dimension i + dim/2.
    """

    dim: int
    theta: float
    scaling: RopeScaling | None = None


class QkNorm(str, Enum):
    """What the RMS norm of queries and keys, before their rotation, runs over."""

    NONE = "none"
    HEAD = "head"  # each head by itself
    PROJECTION = "projection"  # all heads together


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention (arXiv:2305.13245).

    rope.dim may be below head_dim: the first rope.dim dimensions turn, the others pass.
    window: keys a query sees, itself included; None: all before it.
    clip_qkv: bound on the absolute value of queries, keys and values, after the norm.
    sinks: every head has a learned logit that takes part in the softmax and adds no value.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QkNorm = QkNorm.NONE
    clip_qkv: float | None = None
    sinks: bool = False

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Heads and width of what one token leaves in the kv pool: a key, then a value."""
        return self.num_kv_heads, 2 * self.head_dim


@dataclass(frozen=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    The kv pool holds the compressed latent and the shared rotated key part, not heads.
    rope_pairs_adjacent: the checkpoint's rotated dimensions are pairs side by side (2i, 2i+1); the
    weight rules reorder them.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_head_dim: int
    value_head_dim: int
    rope: RopeSpec
    rope_pairs_adjacent: bool
    scale: float
    bias: bool
    latent_norm_eps: float

    @property
    def query_head_dim(self) -> int:
        return self.nope_head_dim + self.rope.dim

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Heads and width of what one token leaves in the kv pool: the latent, the rotated key."""
        return 1, self.kv_lora_rank + self.rope.dim


@dataclass(frozen=True, kw_only=True)
class DenseFfnSpec:
    """down(activation(gate(x)) * up(x)); the activation has the name config.json gives it."""

    intermediate_size: int
    activation: str
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class SharedExpertSpec:
    """A gated FFN that every token takes beside its routed experts.

    gated: its output is multiplied by sigmoid(x @ w) (qwen2_moe).
    """

    ffn: DenseFfnSpec
    gated: bool = False


@dataclass(frozen=True, kw_only=True)
class MoeFfnSpec:
    """Routed experts and, in some families, shared ones."""

    router: RouterSpec
    experts: ExpertSpec
    shared: SharedExpertSpec | None = None


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    attention: AttentionSpec | MlaSpec
    ffn: DenseFfnSpec | MoeFfnSpec


class Quantization(str, Enum):
    """How the weights of a checkpoint are stored; all are converted to the compute dtype."""

    NONE = "none"
    FP8_BLOCKS = "fp8_blocks"  # e4m3 with a scale per block (DeepSeek-V3, arXiv:2412.19437, 3.3)
    MXFP4 = "mxfp4"  # experts in OCP microscaling FP4 (gpt-oss)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model.

    num_prediction_layers: layers for multi-token prediction that the checkpoint may hold after the
    last one; they are not used.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    context_tokens: int
    norm_eps: float
    tie_word_embeddings: bool
    layers: tuple[LayerSpec, ...]
    num_prediction_layers: int = 0
    quantization: Quantization = Quantization.NONE
    quantization_block: tuple[int, int] | None = None  # rows, columns under one scale (FP8_BLOCKS)

    @property
    def moe_layers(self) -> dict[int, MoeFfnSpec]:
        """The MoE layers by their index in the whole model."""
        return {i: s.ffn for i, s in enumerate(self.layers) if isinstance(s.ffn, MoeFfnSpec)}

    @property
    def kv_switch_tokens(self) -> int | None:
        """The longest sequence whose kv differs from that of a longer one; None: none does."""
        scalings = (layer.attention.rope.scaling for layer in self.layers)
        switches = {s.original_context_tokens for s in scalings if isinstance(s, LongRopeScaling)}
        assert len(switches) <= 1, "config.json has one rotary embedding for all layers"
        return switches.pop() if switches else None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def num_experts(self) -> int:
        """Routed experts of a MoE layer; 0 in a dense model."""
        return max((ffn.experts.num_experts for ffn in self.moe_layers.values()), default=0)
