"""Frequency and Markov predictors against plain loops over recorded steps."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.randomness import fresh_generators

from moeserve.core import ConfigError, Routing
from moeserve.predictors import markov
from moeserve.predictors.base import any_row
from moeserve.predictors.frequency import PRIOR_TOKENS, FrequencyPredictor
from moeserve.predictors.markov import BACKOFF_TOKENS, MarkovPredictor

NO_HIDDEN_STATE = torch.zeros(0, 1)  # these predictors look at the routing alone
Step = dict[int, NDArray[np.int64]]


def routing(ids: NDArray[np.int64]) -> Routing:
    return Routing(torch.from_numpy(ids), torch.ones(ids.shape))


def random_step(
    rng: random.Random, layers: list[int], rows: int, num_experts: int, top_k: int
) -> Step:
    return {
        layer: np.array([rng.sample(range(num_experts), top_k) for _ in range(rows)])
        for layer in layers
    }


def test_any_row_is_one_or_another() -> None:
    rng, _ = fresh_generators()
    chances = np.array([[rng.random() for _ in range(3)] for _ in range(4)], np.float32)
    for expert in range(3):
        wanted = 0.0
        for outcome in range(1, 2**4):  # every way in which some row wants it
            p = 1.0
            for row in range(4):
                yes = outcome >> row & 1
                p *= chances[row, expert] if yes else 1 - chances[row, expert]
            wanted += p
        assert any_row(chances)[expert] == pytest.approx(wanted, abs=1e-5)


def test_frequency_is_the_decayed_share() -> None:
    rng, _ = fresh_generators()
    layers, num_experts, top_k, half_life = [1, 2, 5], 6, 2, 7.0
    predictor = FrequencyPredictor(dict.fromkeys(layers, num_experts), 2, half_life)
    seen: dict[int, list[tuple[int, NDArray[np.int64]]]] = {layer: [] for layer in layers}
    tokens = dict.fromkeys(layers, 0)
    for _ in range(12):
        step = random_step(rng, layers, rng.randint(1, 4), num_experts, top_k)
        for layer in layers:
            rows = len(step[layer])
            tokens[layer] += rows
            seen[layer].append((tokens[layer], step[layer]))
            found = predictor.predict(layer, NO_HIDDEN_STATE, routing(step[layer])).probabilities
            for ahead, chances in found.items():
                expected = plain_shares(seen[ahead], tokens[ahead], num_experts, top_k, half_life)
                expected = [1 - (1 - share) ** rows for share in expected]
                np.testing.assert_allclose(chances.numpy(), expected, rtol=1e-4, atol=1e-6)
    place = layers.index(layer)
    assert set(found) == {layers[(place + 1) % 3], layers[(place + 2) % 3]}


def plain_shares(
    seen: list[tuple[int, NDArray[np.int64]]],
    now: int,
    num_experts: int,
    top_k: int,
    half_life: float,
) -> list[float]:
    def weight(at: int) -> float:
        return 0.5 ** ((now - at) / half_life)

    counts = [PRIOR_TOKENS * top_k / num_experts * weight(0)] * num_experts
    total = PRIOR_TOKENS * weight(0)
    for at, ids in seen:
        total += len(ids) * weight(at)
        for row in ids:
            for expert in row:
                counts[expert] += weight(at)
    return [min(count / total, 1.0) for count in counts]


def log_odds(p: float) -> float:
    p = min(max(p, markov.LEAST_CHANCE), 1 - markov.LEAST_CHANCE)
    return math.log(p / (1 - p))


class PlainMarkov:
    """The same estimate from lists of observations, of equally old weight, one row a step."""

    def __init__(self, layers: list[int], num_experts: int, depth: int) -> None:
        self.layers, self.num_experts, self.depth = layers, num_experts, depth
        self.tokens: list[Step] = []

    def targets(self, layer: int) -> list[int]:
        place = self.layers.index(layer)
        return [self.layers[(place + j) % len(self.layers)] for j in range(1, self.depth + 1)]

    def chance(self, layer: int, ahead: int, expert: int) -> float | None:
        """self.tokens: complete tokens, then the running one up to `layer`."""
        wraps = self.layers.index(ahead) <= self.layers.index(layer)
        tokens = self.tokens
        across = [
            (tokens[i][layer][0], tokens[i + wraps][ahead][0])
            for i in range(len(tokens) - wraps)
            if ahead in tokens[i + wraps] and layer in tokens[i]
        ]
        along = [
            (tokens[i][ahead][0], tokens[i + 1][ahead][0])
            for i in range(len(tokens) - 1)
            if ahead in tokens[i + 1]
        ]
        if not across:
            return None
        share = sum(expert in after for _, after in across) / len(across)
        top_k = len(tokens[0][layer][0])
        score = log_odds(share)
        score += markov.LAYER_WEIGHT / top_k * self.lift(across, tokens[-1][layer][0], expert)
        last = tokens[-1] if wraps else tokens[-2]
        if along:
            score += markov.TOKEN_WEIGHT / top_k * self.lift(along, last[ahead][0], expert)
        return 1 / (1 + math.exp(-score))

    def lift(
        self, pairs: list[tuple[object, ...]], before: NDArray[np.int64], expert: int
    ) -> float:
        share = sum(expert in after for _, after in pairs) / len(pairs)
        total = 0.0
        for each in before:
            follows = [expert in after for first, after in pairs if each in first]
            p = (sum(follows) + BACKOFF_TOKENS * share) / (len(follows) + BACKOFF_TOKENS)
            total += log_odds(p) - log_odds(share)
        return total


def test_markov_against_lists_of_observations() -> None:
    rng, _ = fresh_generators()
    layers, num_experts, top_k = [0, 2, 3], 5, 2
    depth = rng.randint(1, 3)
    predictor = MarkovPredictor(dict.fromkeys(layers, num_experts), depth, half_life_tokens=1e12)
    plain = PlainMarkov(layers, num_experts, depth)
    compared = 0
    for _ in range(10):
        step = random_step(rng, layers, 1, num_experts, top_k)
        plain.tokens.append({})
        for layer in layers:
            plain.tokens[-1][layer] = step[layer]
            found = predictor.predict(layer, NO_HIDDEN_STATE, routing(step[layer])).probabilities
            for ahead in plain.targets(layer):
                for expert in range(num_experts):
                    expected = plain.chance(layer, ahead, expert)
                    if expected is None:
                        assert ahead not in found
                        continue
                    assert float(found[ahead][expert]) == pytest.approx(expected, abs=2e-4)
                    compared += 1
    assert compared > 100


def test_markov_of_rows_is_that_of_single_tokens() -> None:
    """What a batch teaches and predicts does not depend on how its rows are spread over steps."""
    rng, _ = fresh_generators()
    layers, num_experts, top_k, rows = [0, 1], 6, 2, 3
    sizes = dict.fromkeys(layers, num_experts)
    together = MarkovPredictor(sizes, 1, half_life_tokens=1e12)
    steps = [random_step(rng, layers, rows, num_experts, top_k) for _ in range(6)]
    for number, step in enumerate(steps):
        if number:  # rows come in another order each time, and somebody says so
            order = rng.sample(range(rows), rows)
            step = {layer: ids[order] for layer, ids in step.items()}
            steps[number] = step
            previous = rng.sample(range(rows), rows)
            together.begin_step(np.array(previous))
        else:
            previous = [-1] * rows
        for layer in layers:
            together.predict(layer, NO_HIDDEN_STATE, routing(step[layer]))
        steps[number] = {**step, -1: np.array(previous)}
    # the transitions between the layers of a token, counted row by row
    pairs = [(step[0][row], step[1][row]) for step in steps for row in range(rows)]
    counted = together._across[0, 1]
    for before in range(num_experts):
        for after in range(num_experts):
            number = sum(before in first and after in second for first, second in pairs)
            assert counted._pairs[before, after] == pytest.approx(number, abs=1e-3)
    # and those between tokens, through the rows that were named
    along = together._along[1]
    expected = np.zeros((num_experts, num_experts))
    for earlier, later in itertools.pairwise(steps):
        for row, source in enumerate(later[-1]):
            expected[np.ix_(earlier[1][source], later[1][row])] += 1
    np.testing.assert_allclose(along._pairs, expected, atol=1e-3)


def test_markov_learns_a_rule() -> None:
    """Layer 1 always takes the experts of layer 0, moved by one."""
    rng, _ = fresh_generators()
    predictor = MarkovPredictor({0: 8, 1: 8}, 1)
    right = 0
    for number in range(400):
        first = random_step(rng, [0], 1, 8, 2)[0]
        found = predictor.predict(0, NO_HIDDEN_STATE, routing(first)).probabilities
        second = (first + 1) % 8
        predictor.predict(1, NO_HIDDEN_STATE, routing(second))
        if number >= 300:
            best = found[1].topk(2).indices.tolist()
            right += len(set(best) & set(second[0].tolist()))
    assert right >= 195


def test_markov_survives_another_number_of_rows_and_none() -> None:
    predictor = MarkovPredictor({0: 4, 1: 4}, 2)
    for rows in (2, 0, 1, 5, 5):
        for layer in (0, 1):
            found = predictor.predict(layer, NO_HIDDEN_STATE, routing(np.tile([0, 1], (rows, 1))))
            for chances in found.probabilities.values():
                assert bool(((chances >= 0) & (chances <= 1)).all())


@pytest.mark.parametrize("make", [FrequencyPredictor, MarkovPredictor])
def test_a_depth_of_none_is_refused(make: type[FrequencyPredictor]) -> None:
    with pytest.raises(ConfigError, match="depth"):
        make({0: 4}, 0)
