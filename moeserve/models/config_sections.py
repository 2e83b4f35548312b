"""The parts of config.json that most families share: rotary embedding, quantisation, frame."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moeserve.core import ModelError
from moeserve.cpu_backend.activations import ELEMENTWISE
from moeserve.models.config_reader import ConfigReader
from moeserve.models.spec import (
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MlaSpec,
    ModelSpec,
    Quantization,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"


def read_rope(
    reader: ConfigReader,
    head_dim: int,
    *,
    default_theta: float = 10_000.0,
    partial: float | None = None,
) -> RopeSpec:
    """The rotary embedding: `rope_parameters`, or on the hub `rope_theta` and `rope_scaling`.

    partial: the family's default share of the head that turns, in a family that has one; in the
    others the field is refused. The nested value wins over the outer one, as in transformers.
    """
    section = reader.section("rope_scaling", "rope_parameters")
    inner = section if section is not None else ConfigReader({})
    theta = reader.positive("rope_theta", default=default_theta)
    theta = inner.positive("rope_theta", default=theta)
    if theta <= 1:
        raise ModelError(f"rope_theta: {theta}: expected a number above 1", field="rope_theta")
    share = 1.0
    if partial is not None:
        share = reader.positive("partial_rotary_factor", default=partial)
        share = inner.positive("partial_rotary_factor", default=share)
    else:
        for each in (reader, inner):
            each.only("partial_rotary_factor", 1, why="this family turns whole heads")
    dim = int(head_dim * share)
    if dim % 2 or not 0 < dim <= head_dim:
        raise ModelError(
            f"partial_rotary_factor: {share} of head_dim {head_dim} turns {dim} dimensions; "
            "expected an even number, at most the head",
            field="partial_rotary_factor",
        )
    scaling = _read_scaling(inner, reader, dim)
    inner.finish()
    return RopeSpec(dim=dim, theta=theta, scaling=scaling)


def _read_scaling(reader: ConfigReader, outer: ConfigReader, dim: int) -> RopeScaling | None:
    """outer: the whole config.json. dim: dimensions that turn."""
    context_tokens = outer.integer("max_position_embeddings")
    kind = reader.text("rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind == "dynamic":
        # Dynamic NTK leaves the base alone up to max_position_embeddings, and no sequence here is
        # longer than that.
        reader.positive("factor")
        return None
    if kind == "linear":
        return LinearScaling(factor=reader.positive("factor"))
    if kind == "llama3":
        low = reader.positive("low_freq_factor")
        high = reader.positive("high_freq_factor")
        if high <= low:
            raise reader.refusal("high_freq_factor", f"expected more than low_freq_factor ({low})")
        return Llama3Scaling(
            factor=reader.positive("factor"),
            original_context_tokens=reader.integer(
                "original_max_position_embeddings", default=context_tokens
            ),
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if kind == "yarn":
        return _read_yarn(reader, context_tokens)
    if kind == "longrope":
        return _read_long_rope(reader, outer, context_tokens, dim)
    name = "rope_type" if reader.has("rope_type") else "type"
    raise reader.refusal(name, "implemented: default, dynamic, linear, llama3, longrope, yarn")


def _read_long_rope(
    reader: ConfigReader, outer: ConfigReader, context_tokens: int, dim: int
) -> LongRopeScaling:
    """Phi-3 has the original context outside of `rope_scaling`."""
    name = "original_max_position_embeddings"
    original = (reader if reader.has(name) else outer).integer(name, at_least=2)
    factors = {}
    for field in ("short_factor", "long_factor"):
        factors[field] = reader.numbers(field)
        if len(factors[field]) != dim // 2 or min(factors[field]) <= 0:
            raise reader.refusal(field, f"expected {dim // 2} numbers above 0")
    factor = reader.positive("factor", default=context_tokens / original)
    amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
        original_context_tokens=original,
        attention_factor=reader.positive("attention_factor", default=amplitude),
    )


def _read_yarn(reader: ConfigReader, context_tokens: int) -> YarnScaling:
    factor = reader.positive("factor")
    mscale = reader.number("mscale", default=0.0)
    mscale_all_dim = reader.number("mscale_all_dim", default=0.0)
    attention_factor = yarn_mscale(factor, 1.0)
    if mscale and mscale_all_dim:
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return YarnScaling(
        factor=factor,
        original_context_tokens=reader.integer(
            "original_max_position_embeddings", default=context_tokens
        ),
        beta_fast=reader.positive("beta_fast", default=32.0),
        beta_slow=reader.positive("beta_slow", default=1.0),
        attention_factor=reader.number("attention_factor", default=attention_factor),
        truncate=reader.flag("truncate", default=True),
        mscale_all_dim=mscale_all_dim,
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature (arXiv:2309.00071, equation 22), with DeepSeek's coefficient."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_quantization(
    reader: ConfigReader, *extra: Quantization
) -> tuple[Quantization, tuple[int, int] | None]:
    """How the weights are stored, and the rows and columns under one scale.

    Every family reads FP8 blocks; `extra` names what this one reads besides. Formats that quantise
    activations at run time are computed with exact activations here.
    """
    section = reader.section("quantization_config")
    if section is None:
        return Quantization.NONE, None
    methods = {"fp8": Quantization.FP8_BLOCKS, "mxfp4": Quantization.MXFP4}
    allowed = {k: v for k, v in methods.items() if v in (Quantization.FP8_BLOCKS, *extra)}
    method = section.choice("quant_method", allowed)
    # Which modules are left alone shows in the checkpoint: their weights have no scale.
    section.ignore("modules_to_not_convert", "ignored_layers")
    block: tuple[int, int] | None = None
    if method is Quantization.FP8_BLOCKS:
        section.only("fmt", "e4m3")
        section.only("activation_scheme", "dynamic")
        section.only("scale_fmt", "float", "ue8m0")  # either way a factor per block
        sizes = section.list_of("weight_block_size", int)
        if len(sizes) != 2 or min(sizes) < 1:
            raise section.refusal(
                "weight_block_size", "expected two sizes; per-tensor FP8 is not implemented"
            )
        block = (sizes[0], sizes[1])
    section.ignore("dequantize")  # asks transformers for what happens here anyway
    section.finish()
    return method, block


def read_head_dim(reader: ConfigReader) -> int:
    """head_dim, by default hidden_size / num_attention_heads."""
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    if not reader.has("head_dim") and hidden % heads:
        raise reader.refusal("num_attention_heads", f"must divide hidden_size ({hidden})")
    return reader.integer("head_dim", default=hidden // heads)


def read_kv_heads(reader: ConfigReader) -> int:
    """num_key_value_heads, by default all heads; it must divide them."""
    heads = reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise reader.refusal("num_key_value_heads", f"must divide num_attention_heads ({heads})")
    return kv_heads


def read_layer_windows(
    reader: ConfigReader, window: int | None, default: Sequence[str]
) -> tuple[int | None, ...]:
    """The sliding window of every layer, from `layer_types` or the family's default for it."""
    num_layers = reader.integer("num_hidden_layers")
    types = reader.list_of("layer_types", str) or tuple(default)
    if len(types) != num_layers:
        raise reader.refusal("layer_types", f"expected num_hidden_layers ({num_layers}) entries")
    windows: list[int | None] = []
    for kind in types:
        if kind == SLIDING_ATTENTION and window is None:
            raise reader.refusal("layer_types", "sliding layers need a sliding_window")
        if kind not in (FULL_ATTENTION, SLIDING_ATTENTION):
            raise reader.refusal(
                "layer_types", f"implemented: {FULL_ATTENTION}, {SLIDING_ATTENTION}"
            )
        windows.append(window if kind == SLIDING_ATTENTION else None)
    return tuple(windows)


def read_sparse_layers(reader: ConfigReader) -> tuple[bool, ...]:
    """Qwen's rule for which layers have experts: every `decoder_sparse_step`-th, but for those
    listed in `mlp_only_layers`."""
    step = reader.integer("decoder_sparse_step", default=1)
    dense = reader.list_of("mlp_only_layers", int)
    return tuple(
        layer not in dense and (layer + 1) % step == 0
        for layer in range(reader.integer("num_hidden_layers"))
    )


def read_activation(reader: ConfigReader) -> str:
    """hidden_act, one of those that are implemented."""
    return reader.choice("hidden_act", {name: name for name in ELEMENTWISE}, default="silu")


def read_frame(
    reader: ConfigReader,
    layers: Sequence[LayerSpec],
    *,
    norm_eps: float,
    num_prediction_layers: int | None = None,
    quantization: Sequence[Quantization] = (),
) -> ModelSpec:
    """The model around its layers; refuses what nobody has read.

    norm_eps, num_prediction_layers: the family's defaults; None: it has no such layers.
    """
    method, block = read_quantization(reader, *quantization)
    extra = 0
    if num_prediction_layers is not None:
        names = ("num_nextn_predict_layers", "num_mtp_layers")
        extra = reader.integer(*names, default=num_prediction_layers, at_least=0)
    spec = ModelSpec(
        model_type=reader.text("model_type"),
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        context_tokens=reader.integer("max_position_embeddings"),
        norm_eps=reader.positive("rms_norm_eps", default=norm_eps),
        tie_word_embeddings=reader.flag("tie_word_embeddings", default=False),
        layers=tuple(layers),
        num_prediction_layers=extra,
        quantization=method,
        quantization_block=block,
    )
    reader.finish()
    return spec


def read_mla(reader: ConfigReader, *, pairs_adjacent: bool) -> MlaSpec:
    """DeepSeek's attention. The softmax scale grows with YaRN's mscale_all_dim."""
    heads = reader.integer("num_attention_heads")
    # Latents are shared by all heads; the field only exists for shared code in transformers.
    reader.only("num_key_value_heads", heads, why="latent attention has no kv groups")
    nope, rope_dim = reader.integer("qk_nope_head_dim"), reader.integer("qk_rope_head_dim")
    reader.ignore("head_dim")  # transformers overwrites it with qk_rope_head_dim
    reader.only("qk_head_dim", nope + rope_dim)
    rope = read_rope(reader, rope_dim)
    temperature = 1.0
    if isinstance(rope.scaling, YarnScaling) and rope.scaling.mscale_all_dim:
        temperature = yarn_mscale(rope.scaling.factor, rope.scaling.mscale_all_dim)
    return MlaSpec(
        num_heads=heads,
        q_lora_rank=reader.optional_integer("q_lora_rank"),
        kv_lora_rank=reader.integer("kv_lora_rank"),
        nope_head_dim=nope,
        value_head_dim=reader.integer("v_head_dim"),
        rope=rope,
        rope_pairs_adjacent=pairs_adjacent,
        scale=(nope + rope_dim) ** -0.5 * temperature**2,
        bias=reader.flag("attention_bias", default=False),
        latent_norm_eps=1e-6,  # transformers and DeepSeek leave it out of config.json
    )
