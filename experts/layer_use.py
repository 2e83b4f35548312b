"""What a step asks of a layer's experts, counted over all rows of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from moeserve.core import LayerUse, Routing

#: (layer, routing, number of experts) to what schedulers and policies look at
CountUse: TypeAlias = Callable[[int, Routing, int], LayerUse]


def count_use(layer: int, routing: Routing, num_experts: int) -> LayerUse:
    """routing's ids and weights [T, K] must be on the CPU."""
    ids = routing.ids.numpy().ravel()
    rows = np.bincount(ids, minlength=num_experts).astype(np.int32)
    weights = np.bincount(ids, routing.weights.numpy().ravel(), num_experts).astype(np.float32)
    return LayerUse(layer, rows, weights)


def nobody_looks(layer: int, routing: Routing, num_experts: int) -> LayerUse:
    """Where all experts are resident nobody counts: a device would be waited for."""
    return LayerUse(layer, np.empty(0, np.int32), np.empty(0, np.float32))
