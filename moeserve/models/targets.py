"""Where loaded weights go: into tensors, or packed for the native kernels as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from moeserve.core import ExpertSpec, ModelError
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackedWeight, PackFormat
from moeserve.models.spec import DenseFfnSpec, ModelSpec, MoeFfnSpec
from moeserve.models.weight_map import Index, Use, WeightRule

#: what a rule's target becomes
Weight: TypeAlias = Tensor | PackedWeight | PackedExperts
EVERYTHING = slice(None)


class Target(Protocol):
    """One target of a rule while it is filled."""

    @property
    def weight(self) -> Weight:
        """What `put` fills."""

    def put(self, index: Index, rows: slice, piece: Tensor) -> Tensor:
        """Stores piece, which is rows `rows` of the region `index` of the rule's shape.

        Returns the numbers as far as they can be looked at, for a check.
        """


class Targets(Protocol):
    """Makes the target of each rule."""

    def make(self, rule: WeightRule) -> Target:
        """Allocates. Raises ModelError where there is no memory or no form for it."""

    def tied_head(self, embedding: Tensor) -> Tensor | PackedWeight:
        """The head of a model that uses its embedding [V, H] as one."""


class TensorTarget:
    """A tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.weight = tensor

    def put(self, index: Index, rows: slice, piece: Tensor) -> Tensor:
        region = self.weight[index]
        if region.dim() == 0:
            region, piece = region.reshape(1), piece.reshape(1)
        stored = region[rows]
        stored.copy_(piece)
        return stored


@dataclass(frozen=True)
class TensorTargets:
    """Every weight a tensor, in `dtype` unless its rule names another, on `device`."""

    dtype: torch.dtype
    device: torch.device

    def make(self, rule: WeightRule) -> TensorTarget:
        dtype = rule.dtype or self.dtype
        try:
            return TensorTarget(torch.empty(rule.shape, dtype=dtype, device=self.device))
        except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, a plain one on the CPU
            raise ModelError(
                f"{rule.target}: no memory on {self.device} for {list(rule.shape)}: {error}",
                hint="use a smaller dtype, a smaller model or a device with more memory",
            ) from error

    def tied_head(self, embedding: Tensor) -> Tensor:
        return embedding


class PackedWeightTarget:
    """The weight of a linear layer, packed row by row."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight
        self._rows = _numbered(weight.shape[:-1])

    def put(self, index: Index, rows: slice, piece: Tensor) -> Tensor:
        self.weight.put(self._rows[index][rows], piece)
        return piece


class PackedExpertsTarget:
    """One of the two matrices of all experts of a layer. shape: [(E,) rows, K]."""

    def __init__(self, experts: PackedExperts, use: Use, shape: tuple[int, ...]) -> None:
        self.weight = experts
        self._put = experts.put_gate_up if use is Use.GATE_UP else experts.put_down
        self._rows = _numbered(shape[:-1])
        self._num_rows = shape[-2]

    def put(self, index: Index, rows: slice, piece: Tensor) -> Tensor:
        ids = self._rows[index][rows].flatten()
        for expert, own in self._by_expert(ids):
            self._put(expert, ids[own] % self._num_rows, piece.reshape(len(ids), -1)[own])
        return piece

    def _by_expert(self, ids: Tensor) -> Iterator[tuple[int, slice]]:
        """Each expert whose rows are among `ids`, which are in order, and where they stand."""
        experts, counts = torch.unique_consecutive(ids // self._num_rows, return_counts=True)
        stop = 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            start, stop = stop, stop + count
            yield expert, slice(start, stop)


def _numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


@dataclass(frozen=True)
class WeightFormats:
    """How packed weights are stored, by what they are for."""

    product: PackFormat
    experts: PackFormat
    head: PackFormat
    scores: PackFormat

    def describe(self) -> str:
        """For ModelInfo.notes."""
        parts = ("experts", "product", "head", "scores")
        return ", ".join(f"{part}: {getattr(self, part).name}" for part in parts)


class PackedTargets:
    """Weights of products packed for the native kernels, the others as tensors."""

    def __init__(
        self, spec: ModelSpec, runtime: NativeRuntime, formats: WeightFormats, plain: TensorTargets
    ) -> None:
        self._spec = spec
        self._runtime = runtime
        self._formats = formats
        self._plain = plain
        self._experts: dict[str, PackedExperts] = {}

    def make(self, rule: WeightRule) -> Target:
        if rule.use is Use.PLAIN:
            return self._plain.make(rule)
        if rule.use in (Use.GATE_UP, Use.DOWN):
            return PackedExpertsTarget(self._experts_of(rule), rule.use, rule.shape)
        formats = {
            Use.PRODUCT: self._formats.product,
            Use.HEAD: self._formats.head,
            Use.SCORES: self._formats.scores,
        }
        weight = PackedWeight(self._runtime.handle, rule.shape, formats[rule.use])
        return PackedWeightTarget(weight)

    def tied_head(self, embedding: Tensor) -> PackedWeight:
        """A copy: products and the look-up of tokens want different forms."""
        head = PackedWeight(self._runtime.handle, tuple(embedding.shape), self._formats.head)
        head.put(torch.arange(len(embedding)), embedding)
        return head

    def _experts_of(self, rule: WeightRule) -> PackedExperts:
        """The experts that a rule fills one half of; made when the first half asks."""
        block, _, _ = rule.target.partition("gate_up" if rule.use is Use.GATE_UP else "down")
        if block not in self._experts:
            spec = expert_spec(self._spec, block)
            self._experts[block] = PackedExperts(self._runtime.handle, spec, self._formats.experts)
        return self._experts[block]


def expert_spec(spec: ModelSpec, block: str) -> ExpertSpec:
    """The experts behind a block of target names: layers.N.experts., .ffn. or .shared."""
    _, layer, kind, _ = block.split(".")
    ffn = spec.layers[int(layer)].ffn
    if kind == "experts":
        assert isinstance(ffn, MoeFfnSpec)
        return ffn.experts
    dense = ffn
    if isinstance(ffn, MoeFfnSpec):
        assert ffn.shared is not None
        dense = ffn.shared.ffn
    assert isinstance(dense, DenseFfnSpec)
    return ExpertSpec(
        num_experts=1,
        hidden_size=spec.hidden_size,
        intermediate_size=dense.intermediate_size,
        activation=dense.activation,
        bias=dense.bias,
    )
