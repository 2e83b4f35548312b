"""Weight rules of a whole model, and of the FFNs that families share: dense, shared, experts.

Targets are named `layers.3.qkv.weight`; builder.py takes them by these names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from moeserve.models.attention_rules import attention_rules
from moeserve.models.sources import FfnNames, Sources
from moeserve.models.spec import DenseFfnSpec, ModelSpec, MoeFfnSpec
from moeserve.models.weight_map import Part, Use, WeightRule, whole

#: (experts, source prefix, target prefix, sources, names) -> the rules of a layer's experts
ExpertRules = Callable[[MoeFfnSpec, str, str, Sources, FfnNames], list[WeightRule]]


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
            *attention_rules(layer, hidden, source + "self_attn.", target, sources),
        ]
        source += f"{ffn_names.block}."
        if isinstance(layer.ffn, DenseFfnSpec):
            rules += ffn_rules(layer.ffn, hidden, source, f"{target}ffn.", sources, ffn_names)
        else:
            rules += _moe_rules(layer.ffn, source, target, sources, ffn_names)
            rules += expert_rules(layer.ffn, source, target, sources, ffn_names)
    return rules


def ffn_rules(
    spec: DenseFfnSpec, hidden: int, source: str, target: str, sources: Sources, names: FfnNames
) -> list[WeightRule]:
    """A gated FFN: gate_up [2I, H] and down [H, I], with biases where it has them."""
    inner = spec.intermediate_size
    rows = ((names.gate, slice(0, inner)), (names.up, slice(inner, 2 * inner)))

    def gate_up(kind: str, use: Use, *inputs: int) -> WeightRule:
        parts = tuple(
            sources.part(f"{source}{name}.{kind}", (inner, *inputs), (place,))
            for name, place in rows
        )
        shape = (2 * inner, *inputs)
        return WeightRule(f"{target}gate_up.{kind}", shape, parts, use=use)

    shape = (hidden, inner)
    down = sources.linear(f"{target}down", f"{source}{names.down}", shape, spec.bias, Use.DOWN)
    bias = [gate_up("bias", Use.GATE_UP_BIAS)] if spec.bias else []
    return [gate_up("weight", Use.GATE_UP, hidden), *bias, *down]


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
