"""Figures of an evaluation against counting by hand, and predictors whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.core import Routing
from moeserve.predictors.base import Prediction, Predictor
from moeserve.predictors.evaluate import Evaluation, RecordedStep, Tally

LAYERS, EXPERTS, TOP_K = (1, 4, 5), 8, 2


class Scripted(Predictor):
    """Says of the next layers what it was given, in order."""

    name = "scripted"

    def __init__(self, says: list[dict[int, Tensor]]) -> None:
        self._says = iter(says)

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        return Prediction(next(self._says))


def random_steps(count: int, rows: int, generator: torch.Generator) -> list[RecordedStep]:
    steps = []
    for number in range(count):
        layers = {}
        for layer in LAYERS:
            ids = torch.rand(rows, EXPERTS, generator=generator).topk(TOP_K).indices
            layers[layer] = (torch.zeros(rows, 1), Routing(ids, torch.ones(rows, TOP_K)))
        previous = np.arange(rows) if number % 5 else np.full(rows, -1)
        steps.append(RecordedStep(layers, previous))
    return steps


def test_tally_against_counting() -> None:
    rng, _ = fresh_generators()
    tally, wanted, found, extra, fetched, right = Tally(), 0, 0, 0, 0, 0
    for _ in range(50):
        chances = [rng.random() for _ in range(EXPERTS)]
        chosen = rng.sample(range(EXPERTS), rng.randint(1, EXPERTS))
        tally.add(np.array(chances, np.float32), np.array(chosen), 0.6)
        ranked = sorted(range(EXPERTS), key=lambda e: -chances[e])
        wanted += len(chosen)
        found += len(set(ranked[: len(chosen)]) & set(chosen))
        extra += len(set(ranked[: len(chosen) + 2]) & set(chosen))
        fetch = {e for e in range(EXPERTS) if chances[e] >= 0.6}
        fetched += len(fetch)
        right += len(fetch & set(chosen))
    figures = tally.figures(expert_bytes=10)
    assert figures["recall_k"] == pytest.approx(found / wanted)
    assert figures["recall_k_plus_2"] == pytest.approx(extra / wanted)
    assert figures["precision"] == pytest.approx(right / fetched)
    assert figures["coverage"] == pytest.approx(right / wanted)
    assert figures["wasted_bytes_per_step"] == pytest.approx((fetched - right) * 10 / 50)


def test_who_knows_everything_finds_everything() -> None:
    _, generator = fresh_generators()
    steps = random_steps(20, 3, generator)
    order = [(n, layer) for n in range(20) for layer in LAYERS]
    says: list[dict[int, Tensor]] = []
    for place in range(len(order)):
        said = {}
        for step, layer in order[place + 1 : place + 3]:
            said[layer] = torch.zeros(EXPERTS)
            said[layer][steps[step].layers[layer][1].ids.flatten()] = 1.0
        says.append(said)
    evaluation = Evaluation(Scripted(says), LAYERS)
    evaluation.run(steps)
    assert set(evaluation.tallies) == {(layer, far) for layer in LAYERS for far in (1, 2)}
    for (layer, far), tally in evaluation.tallies.items():
        figures = tally.figures(1)
        assert figures["recall_k"] == figures["precision"] == figures["coverage"] == 1.0
        # what is foreseen of another text's token is not judged
        wraps = LAYERS.index(layer) + far >= len(LAYERS)
        assert tally.steps == (16 if wraps else 20)
    assert evaluation.of_distance(1, LAYERS).steps == 56


def test_who_knows_nothing_fetches_nothing() -> None:
    _, generator = fresh_generators()
    steps = random_steps(6, 1, generator)
    says = [{layer: torch.full((EXPERTS,), 0.1) for layer in LAYERS if layer != 1}] * 18
    evaluation = Evaluation(Scripted(says), LAYERS)
    evaluation.run(steps, warm_up_steps=2)
    figures = evaluation.tallies[1, 1].figures(1)
    assert figures["precision"] is None
    assert figures["coverage"] == figures["wasted_bytes_per_step"] == 0.0
    assert figures["steps"] == 4
