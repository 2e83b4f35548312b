"""Forces the routing of a model from a recorded trace, so that random weights in a real shape see
real routing. For benchmarks and tests: a served model never runs with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.cache.routing_trace import RoutingTrace
from moeserve.core import ModelError, Routing
from moeserve.experts.layer import MoELayer


class RoutingReplay:
    """Gives each row of a step the next recorded token of its stream.

    A step of as many rows as there are streams advances each stream by one; any other step, a
    prefill, takes consecutive tokens of the first. A stream that ends starts over.
    """

    def __init__(self, trace: RoutingTrace, starts: Sequence[int] = (0,)) -> None:
        """starts: the first token of each stream."""
        self._trace = trace
        self._next = list(starts)
        self._rows: NDArray[np.int64] = np.empty(0, np.int64)

    def routing(self, rank: int, num_rows: int) -> Routing:
        """For the MoE layer that is number `rank` of the model; rank 0 begins a step."""
        if rank == 0:
            self._advance(num_rows)
        return Routing(
            torch.from_numpy(self._trace.ids[self._rows, rank]),
            torch.from_numpy(self._trace.weights[self._rows, rank]),
        )

    def _advance(self, num_rows: int) -> None:
        total = len(self._trace.ids)
        if num_rows == len(self._next):
            self._rows = np.array(self._next) % total
            self._next = [token + 1 for token in self._next]
        else:
            self._rows = (self._next[0] + np.arange(num_rows)) % total
            self._next[0] += num_rows


class ReplayedRouter:
    """Takes a router's place; the router's own work is still done, for its time."""

    def __init__(self, replay: RoutingReplay, rank: int, layer: MoELayer) -> None:
        self.spec = layer.router.spec
        self._replay = replay
        self._rank = rank
        self._router = layer.router

    def __call__(self, x: Tensor) -> Routing:
        self._router(x)
        return self._replay.routing(self._rank, x.shape[0])


def force_routing(layers: Sequence[MoELayer], replay: RoutingReplay, trace: RoutingTrace) -> None:
    """layers: all MoE layers of a model, in order. Raises ModelError for a trace of another one."""
    num_layers, top_k = trace.ids.shape[1:]
    for rank, layer in enumerate(layers):
        spec = layer.router.spec
        if len(layers) > num_layers or spec.top_k != top_k or trace.ids.max() >= spec.num_experts:
            raise ModelError(
                f"routing trace: {num_layers} layers, top {top_k}, experts up to"
                f" {trace.ids.max()}; the model has {len(layers)} layers, top {spec.top_k} of"
                f" {spec.num_experts}",
                hint="replay a trace of a model of the same shape",
            )
        layer.router = ReplayedRouter(replay, rank, layer)
