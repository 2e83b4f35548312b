"""The Markov predictor against the same model in plain loops, and what it learns."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.randomness import fresh_generators

from moeserve.core import Routing
from moeserve.predictors import log_linear
from moeserve.predictors.base import Predictor
from moeserve.predictors.frequency import FrequencyPredictor
from moeserve.predictors.log_linear import LogLinear
from moeserve.predictors.looking_on import LookingOn
from moeserve.predictors.markov import MAX_WEIGHT_BYTES, MarkovPredictor, NumpyMarkovModel
from moeserve.predictors.row_links import RowLinks

NO_HIDDEN_STATE = torch.zeros(0, 1)  # it looks at the routing alone
Ids = NDArray[np.int64]


def routing(ids: Ids) -> Routing:
    return Routing(torch.from_numpy(ids), torch.ones(ids.shape))


def models_of(predictor: MarkovPredictor) -> list[LogLinear]:
    assert isinstance(predictor.model, NumpyMarkovModel)
    return predictor.model.models


def random_rows(rng: random.Random, rows: int, num_experts: int, top_k: int) -> Ids:
    return np.array([rng.sample(range(num_experts), top_k) for _ in range(rows)])


Feature = tuple[int, int]  # layer, expert
Outcome = tuple[int, int]


@dataclass
class PlainMarkov:
    """One row a step, all layers as context, float64 and dictionaries."""

    layers: list[int]
    num_experts: dict[int, int]
    top_k: int
    depth: int
    weights: dict[tuple[int, Feature, Outcome], float] = field(default_factory=dict)
    bias: dict[tuple[int, Outcome], float] = field(default_factory=dict)
    uses: dict[tuple[int, Feature], int] = field(default_factory=dict)
    seen: dict[int, list[int]] = field(default_factory=dict)
    said: dict[int, tuple[list[Feature], dict[Outcome, float]]] = field(default_factory=dict)

    def targets(self, layer: int) -> list[int]:
        place = self.layers.index(layer)
        return [self.layers[(place + j) % len(self.layers)] for j in range(1, self.depth + 1)]

    def predict(self, layer: int, chosen: list[int]) -> dict[Outcome, float]:
        for source in self.layers:
            if source in self.said and layer in self.targets(source):
                features, errors = self.said[source]
                for expert in chosen:
                    errors[layer, expert] -= 1
                if layer == self.targets(source)[-1]:
                    self.correct(source, features, errors)
        self.seen[layer] = chosen
        features = [(at, expert) for at, experts in self.seen.items() for expert in experts]
        share = self.top_k / max(self.num_experts.values())
        chances = {}
        for ahead in self.targets(layer):
            for expert in range(self.num_experts[ahead]):
                outcome = (ahead, expert)
                logit = self.bias.setdefault((layer, outcome), math.log(share / (1 - share)))
                logit += sum(self.weights.get((layer, f, outcome), 0.0) for f in features)
                chances[outcome] = 1 / (1 + math.exp(-logit))
        self.said[layer] = (features, dict(chances))
        return chances

    def correct(self, source: int, features: list[Feature], errors: dict[Outcome, float]) -> None:
        for outcome, error in errors.items():
            self.bias[source, outcome] -= log_linear.BIAS_STEP * error
        for feature in features:
            uses = self.uses[source, feature] = self.uses.get((source, feature), 0) + 1
            step = log_linear.STEP / math.sqrt(1 + log_linear.FADE * uses)
            for outcome, error in errors.items():
                key = (source, feature, outcome)
                self.weights[key] = self.weights.get(key, 0.0) - step * error


def test_against_plain_loops() -> None:
    rng, _ = fresh_generators()
    layers, top_k = [0, 2, 3, 7], 2
    sizes = {layer: rng.randint(4, 7) for layer in layers}
    depth = rng.randint(1, 4)
    predictor = MarkovPredictor(sizes, depth)
    plain = PlainMarkov(layers, sizes, top_k, depth)
    for _ in range(60):
        for layer in layers:
            chosen = random_rows(rng, 1, sizes[layer], top_k)
            expected = plain.predict(layer, chosen[0].tolist())
            found = predictor.predict(layer, NO_HIDDEN_STATE, routing(chosen)).probabilities
            assert list(found) == plain.targets(layer)
            for (ahead, expert), chance in expected.items():
                assert float(found[ahead][expert]) == pytest.approx(chance, abs=1e-5)
    assert max(abs(weight) for weight in plain.weights.values()) > log_linear.STEP


def test_equal_rows_teach_and_predict_what_one_does() -> None:
    """A batch in which all rows agree moves the weights as one row would."""
    rng, _ = fresh_generators()
    sizes, rows = {0: 6, 1: 6, 2: 6}, 4
    one, several = MarkovPredictor(sizes, 2), MarkovPredictor(sizes, 2)
    for _ in range(30):
        several.begin_step(np.array(rng.sample(range(rows), rows)))
        for layer in sizes:
            chosen = random_rows(rng, 1, 6, 2)
            alone = one.predict(layer, NO_HIDDEN_STATE, routing(chosen)).probabilities
            batch = several.predict(
                layer, NO_HIDDEN_STATE, routing(np.repeat(chosen, rows, axis=0))
            ).probabilities
            for ahead, chances in alone.items():
                expected = 1 - (1 - chances) ** rows
                torch.testing.assert_close(batch[ahead], expected, atol=1e-4, rtol=1e-4)


def test_rows_take_their_own_past_along() -> None:
    """Two texts, each with experts of its own in layer 1; rows are left out and change places.

    What a row wants of layer 1 can only be told from what its own text chose there before.
    """
    rng, _ = fresh_generators()
    predictor = MarkovPredictor({0: 8, 1: 8}, 1)
    marks = ([0, 1], [4, 5])
    order: list[int] = [0, 1]
    right = asked = 0
    for number in range(800):
        found = predictor.predict(0, NO_HIDDEN_STATE, routing(random_rows(rng, len(order), 8, 2)))
        if number >= 600 and len(order) == 1:
            best = found.probabilities[1].topk(2).indices.tolist()
            right, asked = right + (sorted(best) == marks[order[0]]), asked + 1
        predictor.predict(1, NO_HIDDEN_STATE, routing(np.array([marks[text] for text in order])))
        chosen = rng.sample(order, len(order))
        if len(order) == 1:  # the other text comes back, with nothing known of it
            chosen = rng.sample([0, 1], 2)
        elif rng.random() < 0.5:
            chosen = chosen[:1]
        previous = [order.index(text) if text in order else -1 for text in chosen]
        predictor.begin_step(np.array(previous))
        order = chosen
    assert asked > 50
    assert right == asked


def test_it_learns_a_rule() -> None:
    """Layer 1 always takes the experts of layer 0, moved by one."""
    rng, _ = fresh_generators()
    predictor = MarkovPredictor({0: 8, 1: 8}, 1)
    right = 0
    for number in range(600):
        first = random_rows(rng, 1, 8, 2)
        found = predictor.predict(0, NO_HIDDEN_STATE, routing(first)).probabilities
        second = (first + 1) % 8
        predictor.predict(1, NO_HIDDEN_STATE, routing(second))
        if number >= 500:
            best = found[1].topk(2).indices.tolist()
            right += len(set(best) & set(second[0].tolist()))
    assert right >= 195


def test_another_number_of_rows_and_none_and_steps_that_break_off() -> None:
    rng, _ = fresh_generators()
    sizes = {0: 4, 1: 5, 4: 4, 5: 4}
    predictor = MarkovPredictor(sizes, rng.randint(1, 4))
    for _ in range(200):
        rows = rng.choice((1, 1, 2, 3, 0))
        if rng.random() < 0.5:
            predictor.begin_step(np.array([rng.randint(-1, 2) for _ in range(rows)], np.int64))
        for layer in list(sizes)[: rng.randint(1, 4)]:
            ids = random_rows(rng, rows, sizes[layer], 2).reshape(rows, 2)
            found = predictor.predict(layer, NO_HIDDEN_STATE, routing(ids))
            for ahead, chances in found.probabilities.items():
                assert chances.shape == (sizes[ahead],)
                assert bool(((chances > 0) & (chances < 1)).all())


def test_many_experts_look_at_fewer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, _ = fresh_generators()
    monkeypatch.setattr("moeserve.predictors.markov.MAX_WEIGHT_BYTES", 4 * 8 * 8 * 2 * 6 * 3)
    sizes = dict.fromkeys(range(6), 8)
    predictor = MarkovPredictor(sizes, 2)
    assert predictor.shape.num_context == 3
    for _ in range(5):
        for layer in sizes:
            predictor.predict(layer, NO_HIDDEN_STATE, routing(random_rows(rng, 1, 8, 2)))


def test_a_very_large_model_looks_fewer_layers_ahead() -> None:
    sizes = dict.fromkeys(range(48), 512)
    predictor = MarkovPredictor(sizes, 6)
    weights = [model.weights for model in models_of(predictor)]
    assert sum(array.nbytes for array in weights) <= MAX_WEIGHT_BYTES
    found = predictor.predict(0, NO_HIDDEN_STATE, routing(np.array([[3, 7]])))
    assert list(found.probabilities) == [1]


def test_a_step_resumed_in_its_middle_sees_no_rows_of_the_step_before() -> None:
    """A step broke off after layer 1, the next one is asked about from layer 2 on."""
    rng, _ = fresh_generators()
    sizes = dict.fromkeys(range(4), 6)
    for rows_after, told in ((2, False), (2, True), (3, True)):
        predictor = MarkovPredictor(sizes, rng.randint(1, 2))
        for layer in (0, 1, 2, 3, 0, 1):
            predictor.predict(layer, NO_HIDDEN_STATE, routing(random_rows(rng, 3, 6, 2)))
        before = [model.weights.copy() for model in models_of(predictor)]
        if told:
            predictor.begin_step(np.full(rows_after, -1))
        for layer in (2, 3):
            ids = random_rows(rng, rows_after, 6, 2)
            assert predictor.predict(layer, NO_HIDDEN_STATE, routing(ids)).probabilities
        for model, weights in zip(models_of(predictor)[:2], before[:2], strict=True):
            assert np.array_equal(model.weights, weights), "learnt from rows of two steps"


def test_nothing_is_learnt_over_layers_that_nobody_asked_about() -> None:
    rng, _ = fresh_generators()
    predictor = MarkovPredictor(dict.fromkeys(range(4), 6), 2)
    for _ in range(3):
        for layer in range(4):
            predictor.predict(layer, NO_HIDDEN_STATE, routing(random_rows(rng, 1, 6, 2)))
    before = [model.weights.copy() for model in models_of(predictor)]
    for layer in (1, 3):  # 3 said something of 0 and 1, 1 of 2 and 3
        predictor.predict(layer, NO_HIDDEN_STATE, routing(random_rows(rng, 1, 6, 2)))
    for model, weights in zip(models_of(predictor), before, strict=True):
        assert np.array_equal(model.weights, weights)


def test_rows_of_a_step_that_was_not_seen_lead_nowhere() -> None:
    links = RowLinks()
    links.tell(np.array([-1, -1]))
    links.turn(2)
    links.tell(np.array([1, 0]))
    links.turn(2)
    assert links.before.tolist() == [1, 0]
    links.tell(np.array([1, 0]))  # and no layer of it is asked about
    links.tell(np.array([0, 1]))
    links.turn(2)
    assert links.rows.tolist() == links.before.tolist() == []
    links.turn(2)
    assert links.before.tolist() == [0, 1]


@pytest.mark.parametrize("make", [MarkovPredictor, FrequencyPredictor])
def test_it_learns_from_some_of_the_steps_that_nobody_asks_about(
    make: Callable[[dict[int, int], int], Predictor],
) -> None:
    """Each layer has experts of its own, as one must know that was never asked before."""
    rng, _ = fresh_generators()
    predictor = make({0: 8, 1: 8, 2: 8}, 2)
    marks = {layer: np.array([rng.sample(range(8), 2)]) for layer in range(3)}
    for _ in range(400):
        predictor.begin_step(np.array([0]))
        for layer, ids in marks.items():
            assert not predictor.look_on(layer, NO_HIDDEN_STATE, routing(ids)).probabilities
    predictor.begin_step(np.array([0]))
    found = predictor.predict(0, NO_HIDDEN_STATE, routing(marks[0])).probabilities
    for layer in (1, 2):
        assert sorted(found[layer].topk(2).indices.tolist()) == sorted(marks[layer][0].tolist())


def test_it_looks_on_in_two_of_eight_steps_one_after_the_other() -> None:
    looking_on = LookingOn()
    steps = [[looking_on.looks(layer) for layer in (1, 4)] for _ in range(24)]
    assert steps == ([[True, True]] * 2 + [[False, False]] * 6) * 3


def test_a_copy_goes_on_as_the_predictor_does_and_by_itself() -> None:
    rng, _ = fresh_generators()
    sizes = dict.fromkeys(range(4), 6)
    predictor = MarkovPredictor(sizes, 2)

    def ask(of: MarkovPredictor, layer: int, ids: Ids) -> dict[int, torch.Tensor]:
        found = of.predict(layer, NO_HIDDEN_STATE, routing(ids)).probabilities
        return {ahead: chances.clone() for ahead, chances in found.items()}

    for _ in range(20):
        for layer in sizes:
            ask(predictor, layer, random_rows(rng, 1, 6, 2))
    other = deepcopy(predictor)
    before = ask(predictor, 0, np.array([[0, 1]]))
    for layer in sizes:
        ids = np.array([[0, 1]]) if layer == 0 else random_rows(rng, 1, 6, 2)
        expected = before if layer == 0 else ask(predictor, layer, ids)
        found = ask(other, layer, ids)
        for ahead, chances in expected.items():
            assert torch.equal(found[ahead], chances)
    assert not torch.equal(
        ask(predictor, 0, np.array([[2, 3]]))[1], ask(other, 0, np.array([[4, 5]]))[1]
    )
