"""One number for every expert of a model, so that books and scores are plain arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from moeserve.core import ExpertKey

Numbers = NDArray[np.int64]


class ExpertNumbers:
    """Numbers 0 to N-1 for all experts: layer by layer in rising order, a layer's in one run."""

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        """num_experts: experts per MoE layer, by the layer's index in the model."""
        self.layers = tuple(sorted(num_experts))
        self.sizes = tuple(num_experts[layer] for layer in self.layers)
        self.rank_of = {layer: rank for rank, layer in enumerate(self.layers)}
        starts = np.cumsum((0, *self.sizes)).tolist()
        self.total: int = starts[-1]  # N
        self.start_of = dict(zip(self.layers, starts, strict=False))
        self.span_of = {
            layer: slice(start, start + num_experts[layer])
            for layer, start in self.start_of.items()
        }
        # [N] which layer a number belongs to, as its place in `layers`
        self.rank = np.repeat(np.arange(len(self.layers)), self.sizes)
        self._all_of = {
            layer: np.arange(span.start, span.stop) for layer, span in self.span_of.items()
        }

    def of_layers(self, layers: Iterable[int]) -> Numbers:
        """Numbers of all experts of some layers, one layer after the other."""
        return np.concatenate([self._all_of[layer] for layer in layers])

    def number(self, key: ExpertKey) -> int:
        """IndexError for an expert that the layer has not, KeyError for a layer that is none."""
        span = self.span_of[key.layer]
        if not 0 <= key.expert < span.stop - span.start:
            raise IndexError(f"layer {key.layer} has no expert {key.expert}")
        return int(span.start) + key.expert

    def key(self, number: int) -> ExpertKey:
        layer = self.layers[int(self.rank[number])]
        return ExpertKey(layer, int(number) - self.start_of[layer])

    def of(self, layer: int, experts: Iterable[int]) -> Numbers:
        """Numbers of some experts of one layer, in the given order."""
        numbers: Numbers = np.fromiter(experts, dtype=np.int64)
        numbers += self.start_of[layer]
        return numbers
