"""How long a step of the simulated scheduler takes, and what of the machine it uses."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from moeserve.engine.batch import ScheduledBatch
from moeserve.planner.plan_types import Chunk, StepLoad
from moeserve.planner.shapes import LayerShape
from moeserve.planner.simulate.busy import DECODE, PREFILL, Busy
from moeserve.planner.simulate.experts import ExpertsClock, ExpertsTime
from moeserve.planner.step_costs import LayerCosts

#: a kind of step that was simulated so often is known: the times that it took are used in turn
KNOWN_AFTER, QUICKLY_KNOWN_AFTER = 96, 12


@dataclass(frozen=True)
class Kind:
    """Layers that are alike, and how many there are. index: of one of them."""

    index: int
    count: int


class EngineClock:
    """A `StepClock` of our engine. experts: None in a dense model. quickly: fewer steps of a kind
    are simulated, and steps of nearly as many rows are of one kind.

    hits, asked: of experts in the fast tier, as far as they were simulated.
    """

    def __init__(
        self,
        layers: tuple[LayerShape, ...],
        costs: LayerCosts,
        experts: ExpertsClock | None,
        quickly: bool = False,
    ) -> None:
        self._quickly = quickly
        self._known_after = QUICKLY_KNOWN_AFTER if quickly else KNOWN_AFTER
        self._costs = costs
        self._experts = experts
        self._kinds = _kinds(layers)
        self._num_moe_layers = max(1, sum(layer.experts is not None for layer in layers))
        self._known: dict[tuple[int, int], list[ExpertsTime]] = defaultdict(list)
        self._turns: Counter[tuple[int, int]] = Counter()
        self.busy = Busy()
        self.hits = self.asked = 0

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.asked if self.asked else None

    def begin(self, num_requests: int) -> None:
        """Forgets what was counted of so many requests: what comes is the steady state."""
        self.busy = Busy()
        self.hits = self.asked = 0
        self._known.clear()
        if self._experts is not None:
            self._experts.first_request += num_requests

    def seconds(self, batch: ScheduledBatch) -> float:
        load = load_of(batch)
        step = self._costs.step_work(load)
        us, used = step.us, defaultdict(float, step.used)
        for kind in self._kinds:
            layer = self._costs.layer_work(kind.index, load)
            us += kind.count * layer.us
            for resource, value in layer.used.items():
                used[resource] += kind.count * value
        if self._experts is not None:
            experts = self._of_experts(batch, load, us / self._num_moe_layers)
            us += experts.us
            for resource, value in experts.used.items():
                used[resource] += value
            self.hits += experts.hits
            self.asked += experts.asked
        self.busy.add(PREFILL if load.chunks else DECODE, us, used)
        return us / 1e6

    def _of_experts(self, batch: ScheduledBatch, load: StepLoad, between_us: float) -> ExpertsTime:
        assert self._experts is not None
        key = (len(load.decode_contexts), load.num_rows)
        if self._quickly:
            key = (_coarse(key[0]), _coarse(key[1]))
        known = self._known[key]
        if len(known) < self._known_after:
            known.append(self._experts.step(batch, between_us))
            return known[-1]
        self._turns[key] += 1
        return known[self._turns[key] % len(known)]


def _coarse(count: int) -> int:
    """Exact below 32, beyond to a sixteenth: with many clients hardly two steps are alike."""
    unit: int = 1 << max(0, count.bit_length() - 5)
    return count // unit * unit


def load_of(batch: ScheduledBatch) -> StepLoad:
    decodes = [chunk for chunk in batch.chunks if chunk.num_tokens == 1 and chunk.samples]
    return StepLoad(
        [chunk.stop for chunk in decodes],
        [
            Chunk(chunk.start, chunk.num_tokens, chunk.samples)
            for chunk in batch.chunks
            if not (chunk.num_tokens == 1 and chunk.samples)
        ],
    )


def _kinds(layers: tuple[LayerShape, ...]) -> list[Kind]:
    first: dict[object, int] = {}
    counts: Counter[int] = Counter()
    for layer in layers:
        alike = (layer.attention, tuple((m.rows, m.cols, m.form) for m in layer.products))
        counts[first.setdefault(alike, layer.index)] += 1
    return [Kind(index, count) for index, count in counts.items()]
