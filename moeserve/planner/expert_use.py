"""Which experts rows touch, and which of them no cache can have had: what a bound is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moeserve.cache.routing_trace import load_trace
from moeserve.planner.plan_types import Deployment
from moeserve.planner.shapes import ModelShape
from moeserve.planner.simulate.routing import (
    HIGH_SKEW,
    SimulatedRouting,
    drawn,
    recorded,
)

#: runs of tokens that are looked at
RUNS = 16


class ExpertUse(Protocol):
    """Of all MoE layers of a model, in bytes of expert weights."""

    def touched_bytes(self, rows: float) -> float:
        """That so many rows of one step choose, at least."""
        ...

    def missing_bytes(self, rows: float, slots: int, steps: int) -> float:
        """Of these, what is not among so many slots, at least, on average over so many steps."""
        ...


def touched_experts(num_experts: int, top_k: int, rows: float) -> float:
    """Expected number of experts that rows choose, each top_k of them, evenly."""
    return num_experts * float(1 - (1 - top_k / num_experts) ** rows)


@dataclass(frozen=True)
class EvenUse:
    """Tokens spread over experts evenly, as in MoE-Lens: no trace, and no reuse to be exploited."""

    model: ModelShape

    def touched_bytes(self, rows: float) -> float:
        return sum(
            touched_experts(s.experts.spec.num_experts, s.experts.top_k, rows)
            * s.experts.record_bytes
            for s in self.model.layers
            if s.experts is not None
        )

    def missing_bytes(self, rows: float, slots: int, steps: int) -> float:
        return max(0.0, 1 - slots / self.model.num_experts) * self.touched_bytes(rows)


@dataclass(frozen=True)
class RoutedUse:
    """The least that a routing allows whatever the policy does, Belady's included.

    Rows that follow each other in one text touch fewest experts. Of n steps that touch D different
    experts at most as many were there before as there are slots, so D - slots had to come.
    """

    model: ModelShape
    routing: SimulatedRouting
    _found: dict[int, float] = field(default_factory=dict, compare=False)

    def touched_bytes(self, rows: float) -> float:
        """Straight between whole numbers, which is never above the mean of any mixture."""
        below = int(rows)
        least = self._share(below)
        return self.model.expert_bytes * (
            least + (rows - below) * (self._share(below + 1) - least) if rows > below else least
        )

    def missing_bytes(self, rows: float, slots: int, steps: int) -> float:
        room = self.model.expert_bytes * min(1.0, slots / self.model.num_experts)
        most, count = 0.0, 1
        while count <= max(1, steps) and rows * count <= max(rows, len(self.routing.ids)):
            most = max(most, (self.touched_bytes(rows * count) - room) / count)
            count *= 2
        return most

    def _share(self, rows: int) -> float:
        """Of a layer's experts, those that a run of so many tokens touches; the least of some."""
        rows = min(rows, len(self.routing.ids))
        if rows not in self._found:
            self._found[rows] = self._least(rows)
        return self._found[rows]

    def _least(self, rows: int) -> float:
        if not rows:
            return 0.0
        last = len(self.routing.ids) - rows
        starts = np.unique(np.linspace(0, last, RUNS).astype(np.int64))
        touched = [
            np.count_nonzero(self.routing.uses(np.arange(start, start + rows))[0])
            for start in starts
        ]
        return float(min(touched)) / (len(self.routing.layers) * self.routing.num_experts)


def best_use(deployment: Deployment) -> ExpertUse:
    """Of the trace that was named, else of the most unlike use that is assumed."""
    model, path = deployment.shape, deployment.request.trace
    if not model.num_experts:
        return EvenUse(model)
    if path is not None:
        return RoutedUse(model, recorded(load_trace(path), model))
    return RoutedUse(model, drawn(HIGH_SKEW, model, seed=0, most_experts=0))
