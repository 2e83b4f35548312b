"""Halves of decoder layers in one native call each, x += attention(norm(x)), x += ffn(norm(x)), and
all neighbouring layers that are whole in one.

Calls from Python cost a decode step more than their number suggests, because weights that stream
through the caches leave Python's own memory cold. Bits are those of the separate calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moeserve.cache.expert_cache import Tier
from moeserve.core import LayerUse
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_ffn import NativeFfn
from moeserve.cpu_backend.native_linear import NativeLinear, NativeRmsNorm
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.experts.layer import MoELayer
from moeserve.experts.router import Router
from moeserve.experts.runtime import ExpertRuntime
from moeserve.experts.schedule.intra_layer import ResidentPlacement
from moeserve.models.attention import Attention
from moeserve.models.attention_plan import NativeAttention
from moeserve.models.kv_pool import KvLayer, KvPool
from moeserve.models.layers import RowFunction
from moeserve.models.spec import RopeSpec
from moeserve.models.step_context import StepContext
from moeserve.predictors.none import NonePredictor


class FusedAttention:
    """Adds attention of the normed rows to x [T, H], in place."""

    def __init__(
        self, runtime: NativeRuntime, layer: _native.AttentionLayer, rope: RopeSpec
    ) -> None:
        self.runtime = runtime.handle
        self.layer = layer
        self.rope = rope

    def __call__(self, x: Tensor, step: StepContext, kv: KvLayer) -> None:
        plan = step.attention
        assert isinstance(plan, NativeAttention), "native layers have native plans"
        cosine, sine = step.turns[self.rope]
        self.layer.run(self.runtime, plan.spans, x, cosine, sine, kv.entries, step.kv_write_slots)


class FusedFfn:
    """Adds the FFN of the normed rows to x [T, H], in place."""

    def __init__(self, runtime: NativeRuntime, layer: _native.FfnLayer) -> None:
        self._runtime = runtime.handle
        self.layer = layer

    @property
    def is_whole(self) -> bool:
        """Whether it may be called now; else the half is computed part by part."""
        return True

    def __call__(self, x: Tensor) -> None:
        self.layer.run(self._runtime, x)

    def count(self, seconds: float) -> None:
        """It ran for so long, among others in one call (`FusedLayers`)."""


class FusedExperts(FusedFfn):
    """The same of a layer of experts, the shared one included."""

    def __init__(self, runtime: NativeRuntime, layer: _native.FfnLayer, routed: MoELayer) -> None:
        """routed: the same layer in its parts."""
        super().__init__(runtime, layer)
        self._routed = routed
        self._watch = routed.watch

    @property
    def is_whole(self) -> bool:
        return self._routed.is_whole

    def __call__(self, x: Tensor) -> None:
        """ValueError where an expert is absent: only for a layer that is whole (`MoELayer`)."""
        with self._watch.computing(self._routed.layer):
            super().__call__(x)

    def count(self, seconds: float) -> None:
        self._watch.cpu_s[self._routed.layer] += seconds


class CountedExperts(FusedExperts):
    """The same over a tier that has come to hold everything: its cache still counts the uses."""

    def __init__(self, runtime: NativeRuntime, layer: _native.FfnLayer, routed: MoELayer) -> None:
        super().__init__(runtime, layer, routed)
        rows = np.zeros(routed.router.spec.num_experts, np.int32)
        layer.count_into(rows)
        # of the last run; nobody asks for weights of a layer that is whole
        self._use = LayerUse(routed.layer, rows, np.empty(0, np.float32))
        self._cache = routed.cache

    def __call__(self, x: Tensor) -> None:
        super().__call__(x)
        self._cache.observe(self._use)

    def count(self, seconds: float) -> None:
        super().count(seconds)
        self._cache.observe(self._use)


@dataclass(frozen=True)
class FusedHalves:
    """None: that half is always computed part by part."""

    attention: FusedAttention | None = None
    ffn: FusedFfn | None = None

    @property
    def layer(self) -> tuple[_native.AttentionLayer, _native.FfnLayer] | None:
        """Of a layer whose halves are both there."""
        if self.attention is None or self.ffn is None:
            return None
        return self.attention.layer, self.ffn.layer


class FusedLayers:
    """Layers that are whole, in one call for any number of neighbours."""

    def __init__(self, halves: Sequence[FusedHalves]) -> None:
        """halves: of all layers of a model, in their order."""
        self._halves = halves
        self._seconds = np.zeros(len(halves))  # that the FFN took when it last ran, by layer
        self._stack = _native.LayerStack([half.layer for half in halves], self._seconds)

    def __call__(self, x: Tensor, step: StepContext, kv: KvPool, first: int, stop: int) -> None:
        """Runs the layers from `first` to before `stop` on x [T, H], in place: both halves of each
        are there and whole, and they have one kind of rotation."""
        plan, attention = step.attention, self._halves[first].attention
        assert isinstance(plan, NativeAttention), "native layers have native plans"
        assert attention is not None, "only whole layers run together"
        cosine, sine = step.turns[attention.rope]
        slots = step.kv_write_slots
        self._stack.run(
            attention.runtime, first, stop, x, plan.spans, cosine, sine, kv.native, slots
        )
        for half, seconds in zip(
            self._halves[first:stop], self._seconds[first:stop].tolist(), strict=True
        ):
            assert half.ffn is not None
            half.ffn.count(seconds)


def fuse_attention(
    runtime: NativeRuntime | None, norm: RowFunction, attention: object
) -> FusedAttention | None:
    """Grouped attention with packed weights; None for any other."""
    if runtime is None or not isinstance(attention, Attention):
        return None
    weights, spec, heads = attention.weights, attention.spec, attention.heads
    qkv, output = weights.qkv, weights.output
    packed = isinstance(qkv, NativeLinear) and isinstance(output, NativeLinear)
    if not packed or not isinstance(norm, NativeRmsNorm):
        return None
    assert isinstance(qkv, NativeLinear)
    assert isinstance(output, NativeLinear)
    head_norm = heads.norm
    layer = _native.AttentionLayer(
        norm.weight.numpy(),
        norm.eps,
        qkv.matrix,
        output.matrix,
        spec.num_kv_heads,
        spec.heads_per_kv_head,
        spec.head_dim,
        None if head_norm is None else head_norm.float_weight.flatten().numpy(),
        head_norm is not None and head_norm.together,
        0.0 if head_norm is None else head_norm.eps,
        float("inf") if heads.clip is None else heads.clip,
        spec.scale,
        spec.window or 0,
        None if attention.sinks is None else attention.sinks.flatten().numpy(),
    )
    return FusedAttention(runtime, layer, spec.rope)


def fuse_ffn(runtime: NativeRuntime | None, norm: RowFunction, ffn: RowFunction) -> FusedFfn | None:
    """A dense FFN with packed weights; None for any other."""
    if runtime is None or not isinstance(norm, NativeRmsNorm) or not isinstance(ffn, NativeFfn):
        return None
    return FusedFfn(runtime, _native.FfnLayer(norm.weight.numpy(), norm.eps, [ffn.part]))


def fuse_experts(
    runtime: ExpertRuntime,
    norm: RowFunction,
    routed: MoELayer,
    experts: object,
    shared: RowFunction | None,
) -> FusedExperts | None:
    """Packed experts that are all in memory, or may come to be; else None.

    While some are absent, or somebody has to place or predict them, the layer runs in its parts.
    """
    router = routed.router.native if isinstance(routed.router, Router) else None
    resident = isinstance(runtime.intra, ResidentPlacement)
    predicted = resident and not isinstance(runtime.predictor, NonePredictor)
    local = runtime.cache.tier is Tier.HOST and runtime.workers is None
    native = runtime.native
    if native is None or router is None or not local or predicted:
        return None
    if not isinstance(norm, NativeRmsNorm) or not isinstance(experts, PackedExperts):
        return None
    parts: list[tuple[_native.Router | None, _native.PackedExperts]]
    parts = [(router.handle, experts.native)]
    if shared is not None:
        assert isinstance(shared, NativeFfn), "packed experts stand beside packed shared ones"
        parts.append(shared.part)
    layer = _native.FfnLayer(norm.weight.numpy(), norm.eps, parts)
    return (FusedExperts if resident else CountedExperts)(native, layer, routed)
