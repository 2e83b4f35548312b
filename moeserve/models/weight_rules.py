"""Weight rules of the parts that families share: attention, dense and shared FFNs, experts.

Targets are named `layers.3.qkv.weight`; transformer.py takes them by these names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.experts.weights import dequantize_fp8_blocks
from moeserve.models.spec import (
    AttentionSpec,
    DenseFfnSpec,
    LayerSpec,
    MlaSpec,
    ModelSpec,
    MoeFfnSpec,
    QkNorm,
)
from moeserve.models.weight_map import Codes, Convert, Index, Part, Use, WeightRule, whole

#: rows [N, …] to the region they fill, rows in another order or shape; the rest of the shape stays
#: (except for plain targets, of which no codes are taken)
Reorder = Callable[[Tensor], Tensor]
#: inputs under one scale in the packed fp8 format (cpu_backend/csrc/packed.cpp)
FP8_GROUP = 128


@dataclass(frozen=True)
class FfnNames:
    """What a checkpoint calls the parts of an FFN below `model.layers.N.`."""

    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"


DEFAULT_NAMES = FfnNames()


@dataclass(frozen=True)
class Sources:
    """The tensors of a checkpoint by name; knows which of them are stored as FP8 blocks.

    block: rows and columns under one scale, None where config.json names no such storage.
    dtype: the compute dtype.
    """

    names: frozenset[str]
    block: tuple[int, int] | None
    dtype: torch.dtype

    def part(
        self, name: str, shape: tuple[int, ...], index: Index = (), reorder: Reorder | None = None
    ) -> Part:
        """A checkpoint tensor of that shape, dequantised and reordered into target[index]."""
        scale = f"{name}_scale_inv"
        if self.block is not None and scale in self.names:
            blocks = tuple(-(-n // b) for n, b in zip(shape, self.block, strict=True))
            return Part(
                (name, scale),
                (shape, blocks),
                index,
                convert=self._dequantize(self.block, reorder),
                codes=_fp8_codes(self.block, reorder),
            )
        return Part((name,), (shape,), index, convert=None if reorder is None else _one(reorder))

    def _dequantize(self, block: tuple[int, int], reorder: Reorder | None) -> Convert:
        def convert(sources: Sequence[Tensor]) -> Tensor:
            weight, scale = sources
            plain = dequantize_fp8_blocks(weight, scale, self.dtype, block)
            return plain if reorder is None else reorder(plain)

        return convert

    def rule(
        self, target: str, name: str, shape: tuple[int, ...], use: Use = Use.PLAIN
    ) -> WeightRule:
        """The rule for a target that is one checkpoint tensor."""
        return WeightRule(target, shape, (self.part(name, shape),), use=use)


ExpertRules = Callable[[MoeFfnSpec, str, str, Sources, FfnNames], list[WeightRule]]


def _fp8_codes(block: tuple[int, int], reorder: Reorder | None) -> Codes | None:
    """The codes of an fp8 tensor with a scale per row and FP8_GROUP columns.

    None: blocks of other numbers of columns do not line up with the groups of the packed format.
    """
    block_rows, block_cols = block
    if block_cols % FP8_GROUP:
        return None

    def take(sources: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        weight, scale = sources
        rows, cols = weight.shape
        groups = -(-cols // FP8_GROUP)
        by_row = scale.float().repeat_interleave(block_rows, dim=0)[:rows]
        scales = by_row.repeat_interleave(block_cols // FP8_GROUP, dim=1)[:, :groups]
        codes = weight.view(torch.uint8)
        return (codes, scales) if reorder is None else (reorder(codes), reorder(scales))

    return Codes("fp8", take)


def _one(reorder: Reorder) -> Convert:
    """A convert that takes a single tensor."""
    return lambda sources: reorder(sources[0])


def _shaped(*shape: int) -> Reorder:
    """Splits the rows."""
    return lambda tensor: tensor.unflatten(0, shape)


def model_rules(
    spec: ModelSpec,
    names: Collection[str],
    dtype: torch.dtype,
    ffn_names: FfnNames,
    expert_rules: ExpertRules,
) -> list[WeightRule]:
    """The rules of a whole model, for the tensors that its checkpoint has."""
    sources = Sources(frozenset(names), spec.quantization_block, dtype)
    hidden, vocabulary = spec.hidden_size, spec.vocab_size
    rules = [
        whole("embedding", "model.embed_tokens.weight", (vocabulary, hidden)),
        whole("norm", "model.norm.weight", (hidden,)),
    ]
    if not spec.tie_word_embeddings:
        rules.append(sources.rule("head", "lm_head.weight", (vocabulary, hidden), Use.HEAD))
    for index, layer in enumerate(spec.layers):
        source, target = f"model.layers.{index}.", f"layers.{index}."
        rules += [
            whole(f"{target}attention_norm", f"{source}input_layernorm.weight", (hidden,)),
            whole(f"{target}ffn_norm", f"{source}post_attention_layernorm.weight", (hidden,)),
            *_attention_rules(layer, hidden, source + "self_attn.", target, sources),
        ]
        source += f"{ffn_names.block}."
        if isinstance(layer.ffn, DenseFfnSpec):
            rules += ffn_rules(layer.ffn, hidden, source, f"{target}ffn.", sources, ffn_names)
        else:
            rules += _moe_rules(layer.ffn, source, target, sources, ffn_names)
            rules += expert_rules(layer.ffn, source, target, sources, ffn_names)
    return rules


def _attention_rules(
    layer: LayerSpec, hidden: int, source: str, target: str, sources: Sources
) -> list[WeightRule]:
    if isinstance(layer.attention, MlaSpec):
        return _latent_rules(layer.attention, hidden, source, target, sources)
    return _grouped_rules(layer.attention, hidden, source, target, sources)


def _grouped_rules(
    spec: AttentionSpec, hidden: int, source: str, target: str, sources: Sources
) -> list[WeightRule]:
    heads, group, dim = spec.num_kv_heads, spec.heads_per_kv_head, spec.head_dim
    every = slice(None)

    def qkv(kind: str, *inputs: int) -> WeightRule:
        """[kv_heads, G + 2, D, …]: per kv head its queries, its key, its value."""
        q, kv = (spec.num_heads * dim, *inputs), (heads * dim, *inputs)
        one = _shaped(heads, dim)
        parts = (
            sources.part(
                f"{source}q_proj.{kind}",
                q,
                (every, slice(0, group)),
                _shaped(heads, group, dim),
            ),
            sources.part(f"{source}k_proj.{kind}", kv, (every, group), one),
            sources.part(f"{source}v_proj.{kind}", kv, (every, group + 1), one),
        )
        shape = (heads, group + 2, dim, *inputs)
        return WeightRule(f"{target}qkv.{kind}", shape, parts, use=_use(kind, Use.PRODUCT))

    rules = [qkv("weight", hidden)]
    if spec.qkv_bias:
        rules.append(qkv("bias"))
    rules += _linear(
        f"{target}output",
        f"{source}o_proj",
        (hidden, spec.num_heads * dim),
        spec.output_bias,
        sources,
    )
    if spec.qk_norm is not QkNorm.NONE:
        rules.append(_qk_norm_rule(spec, source, target, sources))
    if spec.sinks:
        parts = (sources.part(f"{source}sinks", (spec.num_heads,), (), _shaped(heads, group)),)
        rules.append(WeightRule(f"{target}sinks", (heads, group), parts))
    return rules


def _qk_norm_rule(spec: AttentionSpec, source: str, target: str, sources: Sources) -> WeightRule:
    """The weights of both norms: [2, D] per head, or for all heads [kv_heads, G + 1, D]."""
    heads, group, dim = spec.num_kv_heads, spec.heads_per_kv_head, spec.head_dim
    q, k = f"{source}q_norm.weight", f"{source}k_norm.weight"
    if spec.qk_norm is QkNorm.HEAD:
        parts = (sources.part(q, (dim,), (0,)), sources.part(k, (dim,), (1,)))
        return WeightRule(f"{target}qk_norm", (2, dim), parts)
    every = slice(None)
    parts = (
        sources.part(
            q, (spec.num_heads * dim,), (every, slice(0, group)), _shaped(heads, group, dim)
        ),
        sources.part(k, (heads * dim,), (every, group), _shaped(heads, dim)),
    )
    return WeightRule(f"{target}qk_norm", (heads, group + 1, dim), parts)


def _latent_rules(
    spec: MlaSpec, hidden: int, source: str, target: str, sources: Sources
) -> list[WeightRule]:
    heads, nope, rope = spec.num_heads, spec.nope_head_dim, spec.rope.dim
    rank, value = spec.kv_lora_rank, spec.value_head_dim

    def halves(num_heads: int, start: int) -> Reorder | None:
        """Per head, brings rotated pairs (2i, 2i+1) from `start` on to (i, i + rope/2)."""

        def reorder(tensor: Tensor) -> Tensor:
            rows = tensor.unflatten(0, (num_heads, -1))
            pieces = (rows[:, :start], rows[:, start::2], rows[:, start + 1 :: 2])
            return torch.cat(pieces, dim=1).flatten(0, 1)

        return reorder if spec.rope_pairs_adjacent else None

    def rotated(name: str, of: str, shape: tuple[int, ...], reorder: Reorder | None) -> WeightRule:
        parts = (sources.part(f"{source}{of}", shape, (), reorder),)
        kind = name.rpartition(".")[2]
        return WeightRule(f"{target}{name}", shape, parts, use=_use(kind, Use.PRODUCT))

    queries = heads * (nope + rope)
    if spec.q_lora_rank is None:
        rules = [rotated("query.weight", "q_proj.weight", (queries, hidden), halves(heads, nope))]
    else:
        ranked = spec.q_lora_rank
        rules = _linear(f"{target}query", f"{source}q_a_proj", (ranked, hidden), spec.bias, sources)
        rules += [
            whole(f"{target}q_norm", f"{source}q_a_layernorm.weight", (ranked,)),
            rotated("q_up.weight", "q_b_proj.weight", (queries, ranked), halves(heads, nope)),
        ]
    latent = "kv_a_proj_with_mqa"
    rules.append(
        rotated("kv_down.weight", f"{latent}.weight", (rank + rope, hidden), halves(1, rank))
    )
    if spec.bias:
        rules.append(rotated("kv_down.bias", f"{latent}.bias", (rank + rope,), halves(1, rank)))
    up = f"{source}kv_b_proj.weight"
    up_shape = (heads * (nope + value), rank)
    key_up = sources.part(up, up_shape, (), lambda w: w.unflatten(0, (heads, -1))[:, :nope])
    value_up = sources.part(
        up, up_shape, (), lambda w: w.unflatten(0, (heads, -1))[:, nope:].transpose(1, 2)
    )
    return [
        *rules,
        whole(f"{target}kv_norm", f"{source}kv_a_layernorm.weight", (rank,)),
        WeightRule(f"{target}key_up", (heads, nope, rank), (key_up,)),
        WeightRule(f"{target}value_up", (heads, rank, value), (value_up,)),
        *_linear(f"{target}output", f"{source}o_proj", (hidden, heads * value), spec.bias, sources),
    ]


def _linear(
    target: str,
    source: str,
    shape: tuple[int, int],
    bias: bool,
    sources: Sources,
    use: Use = Use.PRODUCT,
) -> list[WeightRule]:
    rules = [sources.rule(f"{target}.weight", f"{source}.weight", shape, use)]
    if bias:
        rules.append(sources.rule(f"{target}.bias", f"{source}.bias", shape[:1]))
    return rules


def _use(kind: str, weight: Use) -> Use:
    """A bias is a plain tensor whatever its weight is for."""
    return weight if kind == "weight" else Use.PLAIN


def ffn_rules(
    spec: DenseFfnSpec, hidden: int, source: str, target: str, sources: Sources, names: FfnNames
) -> list[WeightRule]:
    """A gated FFN: gate_up [2I, H] and down [H, I], with biases where it has them."""
    inner = spec.intermediate_size
    rows = ((names.gate, slice(0, inner)), (names.up, slice(inner, 2 * inner)))

    def gate_up(kind: str, *inputs: int) -> WeightRule:
        parts = tuple(
            sources.part(f"{source}{name}.{kind}", (inner, *inputs), (place,))
            for name, place in rows
        )
        shape = (2 * inner, *inputs)
        return WeightRule(f"{target}gate_up.{kind}", shape, parts, use=_use(kind, Use.GATE_UP))

    shape = (hidden, inner)
    down = _linear(f"{target}down", f"{source}{names.down}", shape, spec.bias, sources, Use.DOWN)
    return [gate_up("weight", hidden), *([gate_up("bias")] if spec.bias else []), *down]


def _moe_rules(
    spec: MoeFfnSpec, source: str, target: str, sources: Sources, names: FfnNames
) -> list[WeightRule]:
    """Router and shared experts. The correction bias stays float32: bf16 would change choices."""
    experts, hidden = spec.experts.num_experts, spec.experts.hidden_size
    router = f"{source}{names.router}."
    rules = [
        sources.rule(f"{target}router.weight", f"{router}weight", (experts, hidden), Use.SCORES)
    ]
    if spec.router.bias:
        rules.append(sources.rule(f"{target}router.bias", f"{router}bias", (experts,)))
    if spec.router.correction_bias:
        bias = f"{router}e_score_correction_bias"
        rules.append(whole(f"{target}router.correction", bias, (experts,), torch.float32))
    if spec.shared is not None:
        shared = f"{source}{names.shared}."
        rules += ffn_rules(spec.shared.ffn, hidden, shared, f"{target}shared.", sources, names)
        if spec.shared.gated:
            gate = f"{source}{names.shared}_gate.weight"
            rules.append(sources.rule(f"{target}shared.gate", gate, (1, hidden), Use.SCORES))
    return rules


def separate_or_packed(
    spec: MoeFfnSpec, source: str, target: str, sources: Sources, names: FfnNames
) -> list[WeightRule]:
    """Experts as one tensor each, or as transformers 5 packs them: gate_up_proj and down_proj."""
    num, hidden, inner = (
        spec.experts.num_experts,
        spec.experts.hidden_size,
        spec.experts.intermediate_size,
    )
    gate_up_shape, down_shape = (num, 2 * inner, hidden), (num, hidden, inner)
    packed = f"{source}experts.gate_up_proj"
    if packed in sources.names:
        return [
            _experts(target, "gate_up", packed, gate_up_shape, Use.GATE_UP),
            _experts(target, "down", f"{source}experts.down_proj", down_shape, Use.DOWN),
        ]
    gate_up: list[Part] = []
    down: list[Part] = []
    for e in range(num):
        expert = f"{source}experts.{e}."
        rows = (inner, hidden)
        gate_up += [
            sources.part(f"{expert}{names.gate}.weight", rows, (e, slice(0, inner))),
            sources.part(f"{expert}{names.up}.weight", rows, (e, slice(inner, 2 * inner))),
        ]
        down.append(sources.part(f"{expert}{names.down}.weight", (hidden, inner), (e,)))
    return [
        WeightRule(f"{target}experts.gate_up", gate_up_shape, tuple(gate_up), use=Use.GATE_UP),
        WeightRule(f"{target}experts.down", down_shape, tuple(down), use=Use.DOWN),
    ]


def _experts(
    target: str, kind: str, name: str, shape: tuple[int, int, int], use: Use
) -> WeightRule:
    """A tensor of all experts, read one expert at a time."""
    parts = tuple(Part((name,), (shape,), (e,), (e,)) for e in range(shape[0]))
    return WeightRule(f"{target}experts.{kind}", shape, parts, use=use)
