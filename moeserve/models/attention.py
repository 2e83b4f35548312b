"""Attention over the paged kv, grouped-query and latent, both computed by the step's plan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeserve.models.attention_plan import GroupedHeads, HeadNorm
from moeserve.models.kv_pool import KvLayer
from moeserve.models.layers import RowFunction, per_head_into
from moeserve.models.spec import AttentionSpec, MlaSpec, QkNorm
from moeserve.models.step_context import AttentionLayout, StepContext


@dataclass(frozen=True)
class AttentionWeights:
    """qkv: [kv_heads * (G + 2) * D, H]: per kv head its G query heads, its key, its value.

    qk_norm: [kv_heads, G + 1, D] (per projection) or [1, G + 1, D] (per head): queries, then the
    key.
    sinks: [kv_heads, G]. output: [H, heads * D].
    """

    qkv: RowFunction
    output: RowFunction
    qk_norm: Tensor | None = None
    sinks: Tensor | None = None


class Attention:
    """Grouped-query attention of one layer."""

    def __init__(self, spec: AttentionSpec, weights: AttentionWeights, norm_eps: float) -> None:
        self.spec = spec
        self.layout = AttentionLayout(
            spec.num_kv_heads, spec.heads_per_kv_head, spec.kv_shape[1], spec.window
        )
        self.weights = weights
        self.heads = GroupedHeads(
            spec.rope.dim,
            None if weights.qk_norm is None else HeadNorm(spec.qk_norm, weights.qk_norm, norm_eps),
            spec.clip_qkv,
        )
        self._value = range(spec.head_dim, 2 * spec.head_dim)
        self.sinks = None if weights.sinks is None else weights.sinks.float().contiguous()

    def __call__(self, x: Tensor, step: StepContext, kv: KvLayer) -> Tensor:
        """x: [T, H] -> [T, H]; writes the kv of the rows."""
        spec, weights = self.spec, self.weights
        group = spec.heads_per_kv_head
        qkv = weights.qkv(x).view(len(x), spec.num_kv_heads, group + 2, spec.head_dim)
        step.attention.prepare_grouped(
            qkv, self.heads, step.turns[spec.rope], kv, step.kv_write_slots
        )
        mixed = step.attention.attend(
            qkv[:, :, :group], kv, self.layout, self._value, spec.scale, self.sinks
        )
        return weights.output(mixed.flatten(1))


@dataclass(frozen=True)
class MlaWeights:
    """Projections of latent attention; rotated dimensions in halves, whatever the checkpoint had.

    query: [heads * (nope + rope), H], or, with a query latent, [q_rank, H]; then q_norm: [q_rank]
    and q_up: [heads * (nope + rope), q_rank]. kv_down: [kv_rank + rope, H]. kv_norm: [kv_rank].
    key_up: [heads, nope, kv_rank]. value_up: [heads, kv_rank, value]. output: [H, heads * value].
    """

    query: RowFunction
    kv_down: RowFunction
    kv_norm: Tensor
    key_up: Tensor
    value_up: Tensor
    output: RowFunction
    q_norm: RowFunction | None = None
    q_up: RowFunction | None = None


class LatentAttention:
    """MLA with the up projections of keys and values absorbed (arXiv:2405.04434, section 2.1.2).

    q · (U c) = (Uᵀ q) · c, so that attention runs on the latents as they lie in the pool: one kv
    head of width kv_rank + rope for all query heads.
    """

    def __init__(self, spec: MlaSpec, weights: MlaWeights) -> None:
        self.spec = spec
        self.layout = AttentionLayout(1, spec.num_heads, spec.kv_shape[1], None)
        self._weights = weights
        self._norm = HeadNorm(QkNorm.NONE, weights.kv_norm, spec.latent_norm_eps)

    def __call__(self, x: Tensor, step: StepContext, kv: KvLayer) -> Tensor:
        """x: [T, H] -> [T, H]; writes the kv of the rows.

        Of a long prompt these are the largest tensors of a step: each goes as soon as it was used
        (planner/workspace.py counts what is there at the same time).
        """
        spec, weights = self.spec, self._weights
        query = weights.query(x)
        if weights.q_norm is not None and weights.q_up is not None:
            query = weights.q_up(weights.q_norm(query))
        query = query.unflatten(-1, (spec.num_heads, spec.query_head_dim))
        nope, rotated = query.split((spec.nope_head_dim, spec.rope.dim), dim=-1)

        entry = weights.kv_down(x)  # [T, kv_rank + rope], what the pool keeps of a token
        rank = spec.kv_lora_rank
        queries = x.new_empty(len(x), 1, spec.num_heads, kv.width)
        per_head_into(queries[:, 0, :, :rank], nope, weights.key_up)
        queries[:, 0, :, rank:] = rotated
        del query, nope, rotated
        step.attention.prepare_latent(
            entry,
            queries[:, 0, :, rank:],
            self._norm,
            step.turns[spec.rope],
            kv,
            step.kv_write_slots,
        )
        mixed = step.attention.attend(queries, kv, self.layout, range(rank), spec.scale)
        del queries, entry
        values = x.new_empty(len(x), spec.num_heads, spec.value_head_dim)
        per_head_into(values, mixed[:, 0], weights.value_up)
        del mixed
        return weights.output(values.flatten(1))
