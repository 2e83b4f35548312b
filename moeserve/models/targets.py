"""Where loaded weights go, one target per rule; as tensors, for any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from moeserve.core import ModelError
from moeserve.cpu_backend.packing import PackedExperts, PackedWeight
from moeserve.models.weight_map import Index, WeightRule

#: what a rule's target becomes
Weight: TypeAlias = Tensor | PackedWeight | PackedExperts
EMBEDDING, HEAD = "embedding", "head"


class Target(Protocol):
    """One target of a rule while it is filled."""

    @property
    def weight(self) -> Weight:
        """What `put` fills."""

    @property
    def takes_codes(self) -> bool:
        """Whether parts give their codes, by `put_codes`, instead of numbers."""

    def put(self, index: Index, rows: slice, piece: Tensor) -> Tensor:
        """Stores piece, which is rows `rows` of the region `index` of the rule's shape.

        Returns the numbers as far as they can be looked at, for a check.
        """

    def put_codes(self, index: Index, codes: Tensor, scales: Tensor) -> None:
        """Stores the region `index`: what `Part.codes` took of a checkpoint."""


class Targets(Protocol):
    """Makes the targets of a model's rules."""

    def make(self, rules: Sequence[WeightRule]) -> dict[str, Target]:
        """Allocates, by target name. ModelError: there is no memory, or no form for one of them."""

    def finish(self, made: Mapping[str, Target]) -> dict[str, Weight]:
        """The model's weights, after everything has been put."""


class TensorTarget:
    """A tensor."""

    takes_codes = False

    def __init__(self, tensor: Tensor) -> None:
        self.weight = tensor

    def put(self, index: Index, rows: slice, piece: Tensor) -> Tensor:
        region = self.weight[index]
        if region.dim() == 0:
            region, piece = region.reshape(1), piece.reshape(1)
        stored = region[rows]
        stored.copy_(piece)
        return stored

    def put_codes(self, index: Index, codes: Tensor, scales: Tensor) -> None:
        raise AssertionError("a tensor keeps no codes")


@dataclass(frozen=True)
class TensorTargets:
    """Every weight a tensor, in `dtype` unless its rule names another, on `device`.

    tied_head: the model uses its embedding [V, H] as its head.
    """

    dtype: torch.dtype
    device: torch.device
    tied_head: bool = False

    def make(self, rules: Sequence[WeightRule]) -> dict[str, Target]:
        return {rule.target: TensorTarget(self._allocate(rule)) for rule in rules}

    def finish(self, made: Mapping[str, Target]) -> dict[str, Weight]:
        weights = {name: target.weight for name, target in made.items()}
        if self.tied_head:
            weights[HEAD] = weights[EMBEDDING]
        return weights

    def _allocate(self, rule: WeightRule) -> Tensor:
        try:
            return torch.empty(rule.shape, dtype=rule.dtype or self.dtype, device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, a plain one on the CPU
            raise ModelError(
                f"{rule.target}: no memory on {self.device} for {list(rule.shape)}: {error}",
                hint="use a smaller dtype, a smaller model, a device with more memory, or"
                " --device-memory for some of the experts there and the others on the CPU",
            ) from error
