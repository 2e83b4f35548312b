"""How good predictions are: recorded steps are replayed, and what was foreseen is compared.

Every prediction is judged when its layer runs. With n experts really wanted by the rows of a step
(n = k for one row): recall@k is the share of them among the n likeliest, recall@k+2 among the n + 2
likeliest. Precision, coverage and waste are those of prefetching all experts whose probability
reaches `threshold`, as if none were there already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import Routing
from moeserve.predictors.base import Chances, Prediction, Predictor

EXTRA = 2
#: the "layer" that a step's tokens stand for, from which all layers may be seen
BEFORE = -1
Figures = dict[str, float | None]


@dataclass(frozen=True)
class RecordedStep:
    """One step of a model. layers: by MoE layer in rising order, its input [T, H] and routing.

    previous_rows: [T] as in `Predictor.begin_step`; all -1 where a text begins. recent: [T, W] as
    in `Predictor.foresee`, the last tokens of each row; None where they are not known.
    """

    layers: Mapping[int, tuple[Tensor, Routing]]
    previous_rows: NDArray[np.int64]
    recent: NDArray[np.int64] | None = None


@dataclass
class Tally:
    """Counts over the steps, of one layer seen over one distance."""

    steps: int = 0
    wanted: int = 0
    found: int = 0
    found_extra: int = 0
    fetched: int = 0
    fetched_right: int = 0

    def add(self, chances: Chances, chosen: NDArray[np.int64], threshold: float) -> None:
        """chances: [E]; chosen: the distinct experts that were wanted."""
        wanted = np.zeros(len(chances), bool)
        wanted[chosen] = True
        order = np.argsort(-chances, kind="stable")
        fetched = chances >= threshold
        self.steps += 1
        self.wanted += len(chosen)
        self.found += int(wanted[order[: len(chosen)]].sum())
        self.found_extra += int(wanted[order[: len(chosen) + EXTRA]].sum())
        self.fetched += int(fetched.sum())
        self.fetched_right += int((fetched & wanted).sum())

    def merge(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def figures(self, expert_bytes: int) -> Figures:
        """Shares 0 to 1; bytes per step. Without any fetch there is no precision: None."""
        wasted = self.fetched - self.fetched_right
        return {
            "recall_k": self.found / self.wanted,
            "recall_k_plus_2": self.found_extra / self.wanted,
            "precision": self.fetched_right / self.fetched if self.fetched else None,
            "coverage": self.fetched_right / self.wanted,
            "wasted_bytes_per_step": wasted * expert_bytes / self.steps,
            "steps": self.steps,
        }


@dataclass(frozen=True)
class _Pending:
    source: int
    distance: int
    chances: Chances


@dataclass
class Evaluation:
    """Replays steps through one predictor. tallies: by (layer seen from, MoE layers ahead)."""

    predictor: Predictor
    layers: Sequence[int]
    threshold: float = 0.5
    tallies: dict[tuple[int, int], Tally] = field(default_factory=dict)
    _pending: dict[int, list[_Pending]] = field(default_factory=dict)

    def run(self, steps: Iterable[RecordedStep], warm_up_steps: int = 0) -> None:
        """warm_up_steps: that many first ones teach and do not count."""
        for number, step in enumerate(steps):
            self._step(step, number >= warm_up_steps)

    def _step(self, step: RecordedStep, counts: bool) -> None:
        if (step.previous_rows < 0).any():
            self._pending.clear()  # what was foreseen of the next token was of another text
        self.predictor.begin_step(step.previous_rows)
        place_of = {layer: place for place, layer in enumerate(self.layers)} | {BEFORE: -1}
        if step.recent is not None:
            self._note(BEFORE, self.predictor.foresee(step.recent), place_of)
        for layer, (x, routing) in step.layers.items():
            chosen = np.unique(routing.ids.numpy())
            for seen in self._pending.pop(layer, ()):
                if counts:
                    tally = self.tallies.setdefault((seen.source, seen.distance), Tally())
                    tally.add(seen.chances, chosen, self.threshold)
            self._note(layer, self.predictor.predict(layer, x, routing), place_of)

    def _note(self, source: int, prediction: Prediction, place_of: Mapping[int, int]) -> None:
        for ahead, chances in prediction.probabilities.items():
            distance = (place_of[ahead] - place_of[source] - 1) % len(self.layers) + 1
            seen = _Pending(source, distance, chances.numpy().copy())  # it will change
            self._pending.setdefault(ahead, []).append(seen)

    def of_distance(self, distance: int, sources: Iterable[int]) -> Tally:
        """All of these layers together."""
        total = Tally()
        for source in sources:
            if (source, distance) in self.tallies:
                total.merge(self.tallies[source, distance])
        return total
