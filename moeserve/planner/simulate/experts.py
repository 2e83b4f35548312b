"""How long the routed experts of a step take: what all places of experts have in common, and
experts that are all in memory.

Simulated are the layers that the routing has; the others count as these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moeserve.engine.batch import ScheduledBatch, ScheduledChunk
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.planner.plan_types import Resource
from moeserve.planner.simulate.busy import split_work
from moeserve.planner.simulate.routing import SimulatedRouting
from moeserve.planner.step_costs import MANY_ROWS, EngineStepCosts

Rows = NDArray[np.int64]


@dataclass
class ExpertsTime:
    """Of all MoE layers in one step."""

    us: float = 0.0
    used: dict[Resource, float] = field(default_factory=lambda: defaultdict(float))
    hits: int = 0
    asked: int = 0

    def scaled(self, factor: float) -> ExpertsTime:
        used = {resource: us * factor for resource, us in self.used.items()}
        return ExpertsTime(self.us * factor, used, self.hits, self.asked)


class ExpertsClock(ABC):
    """What all have in common: costs as tables, so that a step of many layers is a few sums."""

    def __init__(self, costs: EngineStepCosts, routing: SimulatedRouting, most_rows: int) -> None:
        self.first_request = 0  # of the routing's that the simulation's first one is like
        self._costs = costs
        self._routing = routing
        self._layers = list(routing.layers)
        self._model: CostModel = costs.expert_costs(self._layers[0])
        counts = range(most_rows + 1)
        floor, slope = self._model.cpu[1], self._model.cpu[MANY_ROWS] / MANY_ROWS
        self._cpu_us = np.array([0.0] + [self._model.cpu[count] for count in counts[1:]])
        work = [split_work(self._cpu_us[n], floor, slope * n) for n in counts]
        work[0] = split_work(0.0, 0.0, 0.0)
        self._memory_us = np.array([each[Resource.CPU_MEMORY] for each in work])
        self._compute_us = np.array([each[Resource.CPU_COMPUTE] for each in work])

    def step(self, batch: ScheduledBatch, between_us: float) -> ExpertsTime:
        """Of all MoE layers. between_us: what lies between the experts of two of them."""
        tokens = np.concatenate([self._tokens(chunk) for chunk in batch.chunks])
        return self._step(tokens, between_us).scaled(1 / self._routing.share)

    def _tokens(self, chunk: ScheduledChunk) -> NDArray[np.int64]:
        """Those of the routing that stand for the chunk's."""
        sequence = chunk.sequence
        return self._routing.places(
            self.first_request + int(sequence.request_id),
            np.arange(chunk.start, chunk.stop),
            sequence.num_prompt_tokens,
            sequence.request.params.max_tokens,
        )

    @abstractmethod
    def _step(self, tokens: Rows, between_us: float) -> ExpertsTime:
        """tokens: [T] of the routing. Of the simulated layers."""

    def _computed(self, rows: Rows) -> dict[Resource, float]:
        return {
            Resource.CPU_MEMORY: float(self._memory_us[rows].sum()),
            Resource.CPU_COMPUTE: float(self._compute_us[rows].sum()),
        }


class ResidentClock(ExpertsClock):
    """All experts in memory: a layer is one job."""

    def _step(self, tokens: Rows, between_us: float) -> ExpertsTime:
        rows, _ = self._routing.uses(tokens)
        us = len(rows) * self._model.cpu_start_us + float(self._cpu_us[rows].sum())
        return ExpertsTime(us, self._computed(rows))
