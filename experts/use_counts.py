"""How many rows chose each expert since the engine began."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import Routing

#: layers' routings, and rows in them, that wait to be counted together
MAX_WAITING: Final = 4096
MAX_WAITING_ROWS: Final = 1 << 18


class UseCounts:
    """An observer of layers.

    Counting costs an array operation or, on a device, waiting for it; so routings are collected,
    which costs next to nothing, and counted many at a time.
    """

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        """num_experts: experts per MoE layer, by the layer's index in the model."""
        self._counts = {layer: np.zeros(size, np.int64) for layer, size in num_experts.items()}
        self._waiting: list[tuple[int, Tensor]] = []
        self._num_rows = 0

    def __call__(self, layer: int, x: Tensor, routing: Routing) -> None:
        self._waiting.append((layer, routing.ids))
        self._num_rows += x.shape[0]
        if len(self._waiting) >= MAX_WAITING or self._num_rows >= MAX_WAITING_ROWS:
            self._count()

    def by_layer(self) -> dict[int, NDArray[np.int64]]:
        """[E] of each MoE layer, in rising order of layers."""
        self._count()
        return {layer: self._counts[layer].copy() for layer in sorted(self._counts)}

    def _count(self) -> None:
        each: dict[int, list[Tensor]] = defaultdict(list)
        for layer, ids in self._waiting:
            each[layer].append(ids.flatten())
        self._waiting.clear()
        self._num_rows = 0
        for layer, parts in each.items():
            counts = self._counts[layer]
            counts += torch.bincount(torch.cat(parts), minlength=len(counts)).cpu().numpy()
