"""The model: embedding, layers, head. One class for every family."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import torch.nn.functional as F
from torch import Tensor

from moeserve.experts.layer import MoELayer
from moeserve.models.attention import Attention, LatentAttention
from moeserve.models.attention_plan import Planner
from moeserve.models.inputs import ForwardBatch
from moeserve.models.kv_pool import KvLayer, KvPool
from moeserve.models.layers import RowFunction
from moeserve.models.native_layer import FusedHalves, FusedLayers
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
        return self.routed.forward(x, step, self.shared)


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

    @property
    def joins(self) -> RopeSpec | None:
        """What it must share with its neighbours to run with them in one call. None: it runs by
        itself, because it has parts that differ, or somebody looks at what happens in between."""
        attention, ffn = self.fused.attention, self.fused.ffn
        if attention is None or ffn is None or not ffn.is_whole or self.timeline.recording:
            return None
        return attention.rope

    def __call__(self, x: Tensor, step: StepContext, kv: KvLayer) -> Tensor:
        """x: [T, H] -> [T, H]; may overwrite it."""
        fused = self.fused
        if fused.attention is not None:
            fused.attention(x, step, kv)
        else:
            x += self.attention(self.attention_norm(x), step, kv)
        self.timeline.lap("attention", layer=self.index)
        if fused.ffn is not None and fused.ffn.is_whole:
            fused.ffn(x)
        else:
            ffn, normed = self.ffn, self.ffn_norm(x)
            x += ffn(normed, step.step) if isinstance(ffn, MoeFfn) else ffn(normed)
        self.timeline.lap("feed forward", layer=self.index)
        return x


class Transformer:
    """A loaded model. Holds no state of requests: kv lives in the pool that is passed in."""

    def __init__(
        self,
        spec: ModelSpec,
        embedding: Tensor,
        layers: tuple[DecoderLayer, ...],
        head: RowFunction,
        planner: Planner,
        timeline: Timeline,
    ) -> None:
        """embedding: [V, H]. head: [R, H] -> [R, V] float32, with the final norm. planner: how
        attention is computed."""
        self.timeline = timeline
        self.spec = spec
        self.layers = layers
        self._together = FusedLayers([layer.fused for layer in layers])
        self._embedding = embedding
        self._head = head
        self._planner = planner
        attentions = [layer.attention for layer in spec.layers]
        self._ropes: dict[RopeSpec, Rope] = {
            attention.rope: Rope(attention.rope, embedding.device) for attention in attentions
        }
        self._layouts: set[AttentionLayout] = {layer.attention.layout for layer in layers}

    def forward(self, batch: ForwardBatch, kv: KvPool) -> Tensor:
        """Computes T tokens, writes their kv, returns hidden states [T, H], not normed."""
        dtype = self._embedding.dtype
        step = StepContext.build(batch, kv, self._ropes, self._layouts, self._planner, dtype)
        x = F.embedding(batch.token_ids, self._embedding)
        self.timeline.lap("inputs")
        for shared, layers in groupby(self.layers, attrgetter("joins")):
            if shared is None:
                for layer in layers:
                    x = layer(x, step, kv.layers[layer.index])
            else:
                first, *rest = layers
                self._together(x, step, kv, first.index, first.index + 1 + len(rest))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H] as returned by forward -> [R, V] float32."""
        return self._head(hidden)
