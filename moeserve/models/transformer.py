"""The model: embedding, layers, final norm, head. One class for every family."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from moeserve.experts.layer import MoELayer
from moeserve.models.attention import Attention, LatentAttention
from moeserve.models.attention_plan import Planner
from moeserve.models.inputs import ForwardBatch
from moeserve.models.kv_pool import KvLayer, KvPool
from moeserve.models.layers import RowFunction
from moeserve.models.native_layer import FusedHalves
from moeserve.models.rope import Rope
from moeserve.models.spec import ModelSpec, RopeSpec
from moeserve.models.step_context import AttentionLayout, StepContext
from moeserve.timeline import Timeline


@dataclass(frozen=True)
class MoeFfn:
    """Routed experts, plus the shared one where the family has it."""

    routed: MoELayer
    shared: RowFunction | None = None

    def __call__(self, x: Tensor, step: int) -> Tensor:
        y = self.routed.forward(x, step)
        return y if self.shared is None else y + self.shared(x)


@dataclass(frozen=True)
class DecoderLayer:
    """Attention, then FFN, each on the normed stream and added to it."""

    attention_norm: RowFunction
    attention: Attention | LatentAttention
    ffn_norm: RowFunction
    ffn: RowFunction | MoeFfn
    index: int
    timeline: Timeline
    fused: FusedHalves = FusedHalves()

    def __call__(self, x: Tensor, step: StepContext, kv: KvLayer) -> Tensor:
        """x: [T, H] -> [T, H]; may overwrite it."""
        fused = self.fused
        if fused.attention is not None:
            fused.attention(x, step, kv)
        else:
            x = x + self.attention(self.attention_norm(x), step, kv)
        self.timeline.lap("attention", layer=self.index)
        if fused.ffn is not None and fused.ffn.is_whole:
            fused.ffn(x)
        else:
            ffn, normed = self.ffn, self.ffn_norm(x)
            x = x + (ffn(normed, step.step) if isinstance(ffn, MoeFfn) else ffn(normed))
        self.timeline.lap("feed forward", layer=self.index)
        return x


class Transformer:
    """A loaded model. Holds no state of requests: kv lives in the pool that is passed in."""

    def __init__(
        self,
        spec: ModelSpec,
        embedding: Tensor,
        layers: tuple[DecoderLayer, ...],
        norm: RowFunction,
        head: RowFunction,
        planner: Planner,
        timeline: Timeline,
    ) -> None:
        """embedding: [V, H]. head: [R, H] -> [R, V]. planner: how attention is computed."""
        self.timeline = timeline
        self.spec = spec
        self.layers = layers
        self._embedding = embedding
        self._norm = norm
        self._head = head
        self._planner = planner
        attentions = [layer.attention for layer in spec.layers]
        self._ropes: dict[RopeSpec, Rope] = {
            attention.rope: Rope(attention.rope, embedding.device) for attention in attentions
        }
        self._layouts: set[AttentionLayout] = {layer.attention.layout for layer in layers}

    def forward(self, batch: ForwardBatch, kv: KvPool) -> Tensor:
        """Computes T tokens, writes their kv, returns hidden states [T, H] after the final norm."""
        dtype = self._embedding.dtype
        step = StepContext.build(batch, kv, self._ropes, self._layouts, self._planner, dtype)
        x = F.embedding(batch.token_ids, self._embedding)
        self.timeline.lap("inputs")
        for layer, layer_kv in zip(self.layers, kv.layers, strict=True):
            x = layer(x, step, layer_kv)
        return self._norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H] as returned by forward -> [R, V] float32."""
        return self._head(hidden).float()
