"""What a predictor is: after each layer's routing, which experts later layers will want."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moeserve.core import Routing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """For layers to come, the probability that each expert is wanted by any row of the batch.

    probabilities: by layer, [E] float32 on the CPU. Layers it says nothing about are absent.
    """

    probabilities: Mapping[int, Tensor] = field(default_factory=dict)


class Predictor(ABC):
    """Called once per MoE layer and step, with what the router there really chose."""

    name: str

    @abstractmethod
    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """What follows after `layer`, whose input was x [T, H]. May learn from `routing`."""
