"""The weights that packed targets store, and the memory that they lie in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeserve.core import ModelError
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.packing import PackFormat
from moeserve.models.weight_map import Use, WeightRule

#: of rules that all fill one stored weight, the experts of a layer or a dense FFN
EXPERT_USES = (Use.GATE_UP, Use.GATE_UP_BIAS, Use.DOWN, Use.DOWN_BIAS)


@dataclass(frozen=True)
class Store:
    """What one stored weight looks like.

    forms: none for a plain tensor in `dtype`; one for a packed matrix, whose shape is [bytes]; for
    experts those of gate and up and of down, [E, bytes of a record].
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    forms: tuple[PackFormat, ...] = ()


def store_of(rule: WeightRule) -> str:
    """The stored weight that a rule fills: `layers.3.experts` for all of a layer's experts."""
    return ".".join(rule.target.split(".")[:3]) if rule.use in EXPERT_USES else rule.target


class Memory(Protocol):
    """Where packed weights lie."""

    @property
    def is_filled(self) -> bool:
        """Whether `reserve` gives weights that are there already, and nothing is to be put."""

    def reserve(self, stores: Sequence[Store]) -> Mapping[str, Tensor]:
        """Room for each, by name. Raises ModelError where there is none."""


class HeapMemory:
    """This process's own memory, in huge pages where the system allows."""

    is_filled = False

    def reserve(self, stores: Sequence[Store]) -> dict[str, Tensor]:
        return {store.name: self._allocate(store) for store in stores}

    def _allocate(self, store: Store) -> Tensor:
        try:
            if not store.forms:
                return torch.empty(store.shape, dtype=store.dtype)
            num_bytes = torch.Size(store.shape).numel()
            return torch.from_numpy(_native.allocate(num_bytes)).view(store.shape)
        except (MemoryError, RuntimeError) as error:
            raise ModelError(
                f"{store.name}: no memory for {list(store.shape)} {store.dtype}: {error}",
                hint="use a smaller dtype, --quantize, or a smaller model",
            ) from error
