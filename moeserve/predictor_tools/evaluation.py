"""Evaluates predictors on a recorded text and says what they cost; the report as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from moeserve.core import ExpertSpec, Routing
from moeserve.models.registry import LoadedModel
from moeserve.predictor_tools.costs import Cost, measure_cost
from moeserve.predictor_tools.recording import Recording
from moeserve.predictors.base import Predictor
from moeserve.predictors.evaluate import BEFORE, Evaluation, Figures, RecordedStep
from moeserve.text_windows import recent_tokens

#: tokens per sequence of the cost measurement
COST_TOKENS = 120


@dataclass(frozen=True)
class PredictorReport:
    """by_layer: by (layer seen from, distance in MoE layers), what `Tally.figures` gives; distances
    that go on into the next token are in `wrapped`. What is said before the first layer is seen
    from layer -1. mean: by distance, all layers that see so far inside the token."""

    name: str
    by_layer: dict[tuple[int, int], Figures]
    wrapped: dict[tuple[int, int], Figures]
    mean: dict[int, Figures]
    costs: list[Cost]

    def as_json(self) -> dict[str, Any]:
        """With lists instead of pairs as keys."""

        def rows(figures: dict[tuple[int, int], Figures]) -> list[Figures]:
            return [
                {"layer": layer, "distance": distance, **each}
                for (layer, distance), each in sorted(figures.items())
            ]

        return {
            "name": self.name,
            "mean": [{"distance": distance, **each} for distance, each in self.mean.items()],
            "layers": rows(self.by_layer),
            "next_token": rows(self.wrapped),
            "costs": [{**asdict(cost), "share": cost.share} for cost in self.costs],
        }


def recorded_steps(
    recording: Recording, streams: int, num_recent: int = 0
) -> Iterator[RecordedStep]:
    """The recording as decode steps of `streams` windows side by side, one token of each a step.

    num_recent: tokens of each row that are told besides.
    """
    plan = recording.plan
    count, length = plan.windows.shape
    layers = {
        layer: (recording.states(layer), recording.sizes(layer), recording.ids(layer))
        for layer in plan.layers
    }
    weights = {layer: recording.weights(layer) for layer in plan.layers}
    recent = recent_tokens(plan.windows, max(num_recent, 1))
    for first in range(0, count - count % streams, streams):
        for position in range(length):
            rows = torch.arange(first, first + streams) * length + position
            step = {}
            for layer, (states, sizes, ids) in layers.items():
                x = states[rows].float() * sizes[rows]
                step[layer] = (x, Routing(ids[rows].long(), weights[layer][rows]))
            previous = np.arange(streams) if position else np.full(streams, -1)
            tokens = recent[first : first + streams, position].numpy() if num_recent else None
            yield RecordedStep(step, previous, tokens)


def evaluate(
    predictor: Predictor,
    recording: Recording,
    streams: int,
    threshold: float,
    expert_bytes: int,
    progress: Callable[[float], None],
) -> PredictorReport:
    """Replays the recording through the predictor. Costs are not measured here."""
    layers = recording.plan.layers
    count, length = recording.plan.windows.shape
    total = count // streams * length

    def steps() -> Iterator[RecordedStep]:
        for number, step in enumerate(recorded_steps(recording, streams, predictor.recent_tokens)):
            if number % 100 == 0:
                progress(number / total)
            yield step

    evaluation = Evaluation(predictor, layers, threshold)
    # What learns while serving has, at the start, nothing to speak from.
    evaluation.run(steps(), warm_up_steps=total // 10)
    place_of = {layer: place for place, layer in enumerate(layers)} | {BEFORE: -1}
    inside: dict[tuple[int, int], Figures] = {}
    wrapped: dict[tuple[int, int], Figures] = {}
    for (layer, distance), tally in evaluation.tallies.items():
        into = inside if place_of[layer] + distance < len(layers) else wrapped
        into[layer, distance] = tally.figures(expert_bytes)
    mean = {
        distance: evaluation.of_distance(
            distance, [layer for layer, far in inside if far == distance and layer != BEFORE]
        ).figures(expert_bytes)
        for distance in sorted({far for layer, far in inside if layer != BEFORE})
    }
    return PredictorReport(predictor.name, inside, wrapped, mean, [])


def measure_costs(
    loaded: LoadedModel,
    make: Callable[[], Predictor],
    recording: Recording,
    rows: Sequence[int],
) -> list[Cost]:
    """For several numbers of sequences decoded together. make: a fresh predictor."""
    windows = recording.plan.windows
    length = min(COST_TOKENS, windows.shape[1])
    costs = []
    for number in rows:
        chosen = windows[torch.arange(number) % len(windows), :length]
        costs.append(measure_cost(loaded, make(), chosen))
    return costs


def expert_bytes_of(spec: ExpertSpec, dtype: torch.dtype) -> int:
    """One expert in the dtype of the model's computation."""
    numbers = 3 * spec.hidden_size * spec.intermediate_size
    if spec.bias:
        numbers += 2 * spec.intermediate_size + spec.hidden_size
    return numbers * dtype.itemsize
