"""How the attention of one step is computed: by torch on any device, or by the native kernels.

A plan is made once per step and serves all layers. What it computes, and the layers that call it,
are the same for both; no layer knows which one it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.models.inputs import ForwardBatch
from moeserve.models.kv_pool import KvLayer, KvPool
from moeserve.models.rope import rotate_
from moeserve.models.spec import QkNorm
from moeserve.models.step_context import AttentionLayout, AttentionTile, attention_tiles

#: cosine and signed sine of the step's positions, each [T, 1, 1, dim] float32
Turns = tuple[Tensor, Tensor]


class HeadNorm:
    """The norm of queries and keys. weight: [kv_heads or 1, G + 1, D]: queries, then the key."""

    def __init__(self, kind: QkNorm, weight: Tensor, eps: float) -> None:
        self.together = kind is QkNorm.PROJECTION
        self.weight = weight
        self.eps = eps
        self.float_weight = weight.float().contiguous()


@dataclass(frozen=True)
class GroupedHeads:
    """What happens to projected heads before attention. clip: bound on absolute values."""

    rope_dim: int
    norm: HeadNorm | None
    clip: float | None


class AttentionPlan(ABC):
    """The attention of one step. Rows are those of the step's batch."""

    @abstractmethod
    def prepare_grouped(
        self, qkv: Tensor, heads: GroupedHeads, turns: Turns, kv: KvLayer, slots: Tensor
    ) -> None:
        """qkv: [T, kv_heads, G + 2, D]. Norms queries and keys, clips everything, turns queries
        and keys. Queries are left in place, key and value of row t in kv slot slots[t]."""

    @abstractmethod
    def prepare_latent(
        self,
        entry: Tensor,
        rotated: Tensor,
        norm: HeadNorm,
        turns: Turns,
        kv: KvLayer,
        slots: Tensor,
    ) -> None:
        """entry: [T, rank + dim]: norms the latent, turns the rest, writes both to the kv slots.
        rotated: [T, heads, dim] of the queries, turned in place. norm.weight: [rank]."""

    @abstractmethod
    def attend(
        self,
        queries: Tensor,
        kv: KvLayer,
        layout: AttentionLayout,
        value: range,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal softmax attention of T rows over the context of their sequences.

        queries: [T, kv_heads, G, D]; a kv row is a key in its first D numbers and a value in those
        of `value`. sinks: [kv_heads, G] float32, logits that join the softmax with value zero.
        Returns [T, kv_heads, G, len(value)].
        """


#: makes the plan of a step, for all layouts that the model's layers have
Planner = Callable[[ForwardBatch, KvPool, Collection[AttentionLayout], torch.dtype], AttentionPlan]


class TorchAttention(AttentionPlan):
    """Fused attention of torch, tile by tile; everything else one operator after the other."""

    def __init__(self, tiles: Mapping[AttentionLayout, tuple[AttentionTile, ...]]) -> None:
        self._tiles = tiles

    @staticmethod
    def plan(
        batch: ForwardBatch, kv: KvPool, layouts: Collection[AttentionLayout], dtype: torch.dtype
    ) -> AttentionPlan:
        return TorchAttention(
            {
                layout: attention_tiles(batch.spans, layout, kv.null_slot, dtype)
                for layout in layouts
            }
        )

    def prepare_grouped(
        self, qkv: Tensor, heads: GroupedHeads, turns: Turns, kv: KvLayer, slots: Tensor
    ) -> None:
        group = qkv.shape[2] - 2
        queries_and_key = qkv[:, :, : group + 1]
        if heads.norm is not None and heads.norm.together:
            _norm_projections(queries_and_key, heads.norm)
        elif heads.norm is not None:
            normed = F.rms_norm(queries_and_key, qkv.shape[3:], eps=heads.norm.eps)
            torch.mul(normed, heads.norm.weight, out=queries_and_key)
        if heads.clip is not None:
            qkv.clamp_(-heads.clip, heads.clip)
        rotate_(queries_and_key[..., : heads.rope_dim], turns)
        kv.write(slots, qkv[:, :, group:])

    def prepare_latent(
        self,
        entry: Tensor,
        rotated: Tensor,
        norm: HeadNorm,
        turns: Turns,
        kv: KvLayer,
        slots: Tensor,
    ) -> None:
        rank = len(norm.weight)
        entry[:, :rank] = F.rms_norm(entry[:, :rank], norm.weight.shape, norm.weight, norm.eps)
        rotate_(rotated[:, None], turns)
        rotate_(entry[:, None, None, rank:], turns)
        kv.write(slots, entry)

    def attend(
        self,
        queries: Tensor,
        kv: KvLayer,
        layout: AttentionLayout,
        value: range,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        # Up to the end of the row: the fused kernels want keys and values equally wide.
        mixed = attend(queries, kv, self._tiles[layout], value.start, scale, sinks)
        return mixed[..., : len(value)]


def _norm_projections(x: Tensor, norm: HeadNorm) -> None:
    """x: [T, kv_heads, G + 1, D], normed in place, all queries together and all keys."""
    group = x.shape[2] - 1
    for heads in (slice(0, group), slice(group, group + 1)):
        part = x[:, :, heads]
        part.copy_(F.rms_norm(part, part.shape[1:], norm.weight[:, heads], norm.eps))


def attend(
    queries: Tensor,
    kv: KvLayer,
    tiles: tuple[AttentionTile, ...],
    value_start: int,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """`AttentionPlan.attend` by torch, with values from value_start to the end of a kv row.

    All query heads of a kv head are rows of one product with its keys, so grouped-query attention
    never repeats keys, and latent attention is the case of one kv head whose value is its key.
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


class NativeAttention(AttentionPlan):
    """The kernels of cpu_backend/csrc/attention.h: two calls for a layer."""

    def __init__(self, handle: _native.Runtime, spans: _native.AttentionSpans) -> None:
        self._handle = handle
        self.spans = spans

    @staticmethod
    def planner(runtime: NativeRuntime) -> Planner:
        def plan(
            batch: ForwardBatch,
            kv: KvPool,
            layouts: Collection[AttentionLayout],
            dtype: torch.dtype,
        ) -> AttentionPlan:
            spans = [(s.start, s.num_rows, s.context_tokens, s.kv_slots) for s in batch.spans]
            return NativeAttention(runtime.handle, _native.AttentionSpans(spans))

        return plan

    def prepare_grouped(
        self, qkv: Tensor, heads: GroupedHeads, turns: Turns, kv: KvLayer, slots: Tensor
    ) -> None:
        norm = heads.norm
        _native.prepare_grouped(
            self._handle,
            qkv,
            *turns,
            None if norm is None else norm.float_weight,
            norm is not None and norm.together,
            0.0 if norm is None else norm.eps,
            float("inf") if heads.clip is None else heads.clip,
            kv.entries,
            slots,
        )

    def prepare_latent(
        self,
        entry: Tensor,
        rotated: Tensor,
        norm: HeadNorm,
        turns: Turns,
        kv: KvLayer,
        slots: Tensor,
    ) -> None:
        _native.prepare_latent(
            self._handle, entry, rotated, *turns, norm.float_weight, norm.eps, kv.entries, slots
        )

    def attend(
        self,
        queries: Tensor,
        kv: KvLayer,
        layout: AttentionLayout,
        value: range,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        out = queries.new_empty(*queries.shape[:3], len(value))
        _native.attend(
            self._handle,
            self.spans,
            queries,
            kv.entries,
            value.start,
            scale,
            layout.window or 0,
            sinks,
            out,
        )
        return out
