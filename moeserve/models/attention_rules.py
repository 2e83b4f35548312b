"""Weight rules of attention, grouped-query and latent."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.models.sources import Reorder, Sources
from moeserve.models.spec import AttentionSpec, LayerSpec, MlaSpec, QkNorm
from moeserve.models.weight_map import Use, WeightRule, whole

#: by the last part of a tensor's name
USES = {"weight": Use.PRODUCT, "bias": Use.PLAIN}


def _shaped(*shape: int) -> Reorder:
    """Splits the rows."""
    return lambda tensor: tensor.unflatten(0, shape)


def attention_rules(
    layer: LayerSpec, hidden: int, source: str, target: str, sources: Sources
) -> list[WeightRule]:
    """source, target: prefixes of the names of a layer's attention."""
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
        return WeightRule(f"{target}qkv.{kind}", shape, parts, use=USES[kind])

    rules = [qkv("weight", hidden)]
    if spec.qkv_bias:
        rules.append(qkv("bias"))
    shape = (hidden, spec.num_heads * dim)
    rules += sources.linear(f"{target}output", f"{source}o_proj", shape, spec.output_bias)
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
        return WeightRule(f"{target}{name}", shape, parts, use=USES[kind])

    queries = heads * (nope + rope)
    if spec.q_lora_rank is None:
        rules = [rotated("query.weight", "q_proj.weight", (queries, hidden), halves(heads, nope))]
    else:
        ranked = spec.q_lora_rank
        rules = sources.linear(f"{target}query", f"{source}q_a_proj", (ranked, hidden), spec.bias)
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
        WeightRule(f"{target}key_up", (heads, nope, rank), (key_up,), use=Use.PER_HEAD),
        WeightRule(f"{target}value_up", (heads, rank, value), (value_up,), use=Use.PER_HEAD),
        *sources.linear(f"{target}output", f"{source}o_proj", (hidden, heads * value), spec.bias),
    ]
