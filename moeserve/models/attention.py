"""Attention over the paged kv, grouped-query and latent, with one core for both.

All query heads of a kv head are rows of one product with its keys, so grouped-query attention
never repeats keys, and latent attention is the case of one kv head whose value is its key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve.models.kv_pool import KvLayer
from moeserve.models.layers import RowFunction, per_head
from moeserve.models.rope import rotate_
from moeserve.models.spec import AttentionSpec, MlaSpec, QkNorm
from moeserve.models.step_context import AttentionLayout, AttentionTile, StepContext


def attend(
    queries: Tensor,
    kv: KvLayer,
    tiles: tuple[AttentionTile, ...],
    value_start: int,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention of T rows over the context of their sequences.

    queries: [T, kv_heads, G, D]; a kv row is a key in its first D numbers and a value from
    value_start on. sinks: [kv_heads, G], logits that join the softmax with value zero.
    Returns [T, kv_heads, G, width - value_start].
    """
    group_heads, key_dim = queries.shape[2:]
    out = queries.new_empty(*queries.shape[:3], kv.width - value_start)
    for tile in tiles:
        context = kv.gather(tile.kv_slots).unflatten(0, (tile.num_spans, -1))
        context = context.transpose(1, 2)  # [B, kv_heads, C, width]
        rows = queries[tile.rows].unflatten(0, (tile.num_spans, tile.num_rows))
        rows = rows.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, kv_heads, G * r, D]
        num_query_rows = rows.shape[2]
        padding = tile.mask.shape[2] - num_query_rows
        mixed = F.scaled_dot_product_attention(
            F.pad(rows, (0, 0, 0, padding)) if padding else rows,
            context[..., :key_dim],
            context[..., value_start:],
            attn_mask=tile.mask if sinks is None else _with_sinks(tile, sinks),
            scale=scale,
        )
        mixed = mixed[:, :, :num_query_rows].unflatten(2, (group_heads, tile.num_rows))
        out[tile.rows] = mixed.permute(0, 3, 1, 2, 4).flatten(0, 1)
    return out


def _with_sinks(tile: AttentionTile, sinks: Tensor) -> Tensor:
    """The tile's mask, [B, kv_heads, M, C], with the sinks in column 0.

    That column reads a key and a value of zero, so what is added to its score is its logit.
    """
    num_heads, group_heads = sinks.shape
    mask = tile.mask.repeat(1, num_heads, 1, 1)
    logits = sinks.repeat_interleave(tile.num_rows, dim=1)  # [kv_heads, G * r]
    mask[:, :, : group_heads * tile.num_rows, 0] = logits
    return mask


@dataclass(frozen=True)
class AttentionWeights:
    """qkv: [kv_heads * (G + 2) * D, H]: per kv head its G query heads, its key, its value.

    qk_norm: [kv_heads, G + 1, D] (per projection) or [G + 1, D] (per head): queries, then the key.
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
        self._weights = weights
        self._norm_eps = norm_eps

    def __call__(self, x: Tensor, step: StepContext, kv: KvLayer) -> Tensor:
        """x: [T, H] -> [T, H]; writes the kv of the rows."""
        spec, weights = self.spec, self._weights
        group = spec.heads_per_kv_head
        qkv = weights.qkv(x).view(len(x), spec.num_kv_heads, group + 2, spec.head_dim)
        queries_and_key = qkv[:, :, : group + 1]
        if spec.qk_norm is QkNorm.HEAD:
            self._norm_heads(queries_and_key)
        elif spec.qk_norm is QkNorm.PROJECTION:
            self._norm_projections(queries_and_key)
        if spec.clip_qkv is not None:
            qkv.clamp_(-spec.clip_qkv, spec.clip_qkv)
        rotate_(queries_and_key[..., : spec.rope.dim], step.turns[spec.rope])
        kv.write(step.kv_write_slots, qkv[:, :, group:])
        tiles = step.tiles[self.layout]
        mixed = attend(qkv[:, :, :group], kv, tiles, spec.head_dim, spec.scale, weights.sinks)
        return weights.output(mixed.flatten(1))

    def _norm_heads(self, x: Tensor) -> None:
        """x: [T, kv_heads, G + 1, D], normed in place, one head at a time."""
        assert self._weights.qk_norm is not None
        normed = F.rms_norm(x, x.shape[-1:], eps=self._norm_eps)
        torch.mul(normed, self._weights.qk_norm, out=x)

    def _norm_projections(self, x: Tensor) -> None:
        """x: [T, kv_heads, G + 1, D], normed in place, all queries together and all keys."""
        weight = self._weights.qk_norm
        assert weight is not None
        group = x.shape[2] - 1
        for heads in (slice(0, group), slice(group, group + 1)):
            part = x[:, :, heads]
            normed = F.rms_norm(part, part.shape[1:], weight[:, heads], self._norm_eps)
            part.copy_(normed)


@dataclass(frozen=True)
class MlaWeights:
    """Projections of latent attention; rotated dimensions in halves, whatever the checkpoint had.

    query: [heads * (nope + rope), H], or, with a query latent, [q_rank, H]; then q_norm: [q_rank]
    and q_up: [heads * (nope + rope), q_rank]. kv_down: [kv_rank + rope, H]. kv_norm: [kv_rank].
    key_up: [heads, nope, kv_rank]. value_up: [heads, kv_rank, value]. output: [H, heads * value].
    """

    query: RowFunction
    kv_down: RowFunction
    kv_norm: RowFunction
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

    def __call__(self, x: Tensor, step: StepContext, kv: KvLayer) -> Tensor:
        """x: [T, H] -> [T, H]; writes the kv of the rows."""
        spec, weights = self.spec, self._weights
        query = weights.query(x)
        if weights.q_norm is not None and weights.q_up is not None:
            query = weights.q_up(weights.q_norm(query))
        query = query.unflatten(-1, (spec.num_heads, spec.query_head_dim))
        nope, rotated = query.split((spec.nope_head_dim, spec.rope.dim), dim=-1)

        entry = weights.kv_down(x)  # [T, kv_rank + rope], what the pool keeps of a token
        entry[:, : spec.kv_lora_rank] = weights.kv_norm(entry[:, : spec.kv_lora_rank])
        queries = x.new_empty(len(x), 1, spec.num_heads, kv.width)
        queries[:, 0, :, : spec.kv_lora_rank] = per_head(nope, weights.key_up)
        queries[:, 0, :, spec.kv_lora_rank :] = rotated
        turns = step.turns[spec.rope]
        rotate_(queries[..., spec.kv_lora_rank :], turns)
        rotate_(entry[:, None, None, spec.kv_lora_rank :], turns)

        kv.write(step.kv_write_slots, entry)
        # The value is the whole key: the fused kernels want both equally wide, and the rotated
        # part of the result is dropped.
        mixed = attend(queries, kv, step.tiles[self.layout], 0, spec.scale)
        values = per_head(mixed[:, 0, :, : spec.kv_lora_rank], weights.value_up)
        return weights.output(values.flatten(1))
