"""gpt-oss (arXiv:2508.10925): attention sinks, a window on every other layer, biased experts with
a clamped SwiGLU whose checkpoints interleave gate and up rows, in bf16 or MXFP4."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moeserve.core import ExpertSpec
from moeserve.cpu_backend.activations import SWIGLU_CLAMPED
from moeserve.experts.router import RouterSpec
from moeserve.experts.weights import deinterleave_gate_up, dequantize_mxfp4
from moeserve.models.config_reader import ConfigReader
from moeserve.models.config_sections import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    read_frame,
    read_kv_heads,
    read_layer_windows,
    read_rope,
)
from moeserve.models.family import Family
from moeserve.models.sources import FfnNames, Sources
from moeserve.models.spec import AttentionSpec, LayerSpec, ModelSpec, MoeFfnSpec, Quantization
from moeserve.models.weight_map import Codes, Part, Use, WeightRule


def read(reader: ConfigReader) -> ModelSpec:
    head_dim = reader.integer("head_dim", default=64)
    bias = reader.flag("attention_bias", default=True)
    reader.only("hidden_act", "silu")
    reader.ignore("initial_context_length")  # original_max_position_embeddings of rope says it
    alternate = (SLIDING_ATTENTION, FULL_ATTENTION)
    types = [alternate[layer % 2] for layer in range(reader.integer("num_hidden_layers"))]
    window = reader.optional_integer("sliding_window")
    moe = _read_moe(reader)
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                num_heads=reader.integer("num_attention_heads"),
                num_kv_heads=read_kv_heads(reader),
                head_dim=head_dim,
                rope=read_rope(reader, head_dim, default_theta=150_000.0),
                window=each,
                qkv_bias=bias,
                output_bias=bias,
                sinks=True,
            ),
            ffn=moe,
        )
        for each in read_layer_windows(reader, window, types)
    ]
    return read_frame(reader, layers, norm_eps=1e-5, quantization=(Quantization.MXFP4,))


def _read_moe(reader: ConfigReader) -> MoeFfnSpec:
    hidden = reader.integer("hidden_size")
    experts = reader.integer("num_local_experts", "num_experts", default=128)
    return MoeFfnSpec(
        router=RouterSpec(
            num_experts=experts,
            top_k=reader.integer("num_experts_per_tok", "experts_per_token", default=4),
            hidden_size=hidden,
            score="softmax_topk",
            bias=True,
            round_weights=True,
        ),
        experts=ExpertSpec(
            num_experts=experts,
            hidden_size=hidden,
            intermediate_size=reader.integer("intermediate_size"),
            activation=SWIGLU_CLAMPED,
            bias=True,
            swiglu_alpha=reader.positive("swiglu_alpha", default=1.702),
            swiglu_limit=reader.positive("swiglu_limit", default=7.0),
        ),
    )


def expert_rules(
    spec: MoeFfnSpec, source: str, target: str, sources: Sources, names: FfnNames
) -> list[WeightRule]:
    """Transposed bf16 experts, or MXFP4 blocks of 32 numbers with a scale each; expert by expert,
    so that no whole layer is held twice."""
    del names  # there is one layout's worth of them
    num, hidden = spec.experts.num_experts, spec.experts.hidden_size
    inner = spec.experts.intermediate_size

    def weight(name: str, rows: int, columns: int, interleaved: bool) -> WeightRule:
        packed = f"{source}experts.{name}"
        blocks = (num, rows, columns // 32)

        def ordered(rows: Tensor) -> Tensor:
            return deinterleave_gate_up(rows, 0) if interleaved else rows

        def take(stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            return ordered(stored[0].flatten(-2)), ordered(stored[1])

        def convert(stored: Sequence[Tensor]) -> Tensor:
            if len(stored) == 1:
                plain = stored[0].mT
            else:
                plain = dequantize_mxfp4(stored[0], stored[1], sources.dtype)
            return ordered(plain)

        tensors: tuple[str, ...] = (packed,)
        shapes: tuple[tuple[int, ...], ...] = ((num, columns, rows),)
        codes: Codes | None = None
        if f"{packed}_blocks" in sources.names:
            tensors, shapes = (f"{packed}_blocks", f"{packed}_scales"), ((*blocks, 16), blocks)
            codes = Codes("mxfp4", take)

        parts = tuple(Part(tensors, shapes, (e,), (e,), convert, codes) for e in range(num))
        short = name.removesuffix("_proj")
        use = Use.GATE_UP if interleaved else Use.DOWN
        return WeightRule(f"{target}experts.{short}", (num, rows, columns), parts, use=use)

    bias = f"{source}experts.gate_up_proj_bias"
    shape = (num, 2 * inner)
    gate_up_bias = sources.part(bias, shape, (), lambda rows: deinterleave_gate_up(rows, 1))
    return [
        weight("gate_up_proj", 2 * inner, hidden, interleaved=True),
        weight("down_proj", hidden, inner, interleaved=False),
        WeightRule(f"{target}experts.gate_up_bias", shape, (gate_up_bias,), use=Use.GATE_UP_BIAS),
        sources.rule(
            f"{target}experts.down_bias",
            f"{source}experts.down_proj_bias",
            (num, hidden),
            Use.DOWN_BIAS,
        ),
    ]


FAMILY = Family("gpt_oss", read, FfnNames(router="router"), expert_rules)
