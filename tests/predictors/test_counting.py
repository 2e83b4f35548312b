"""The frequency predictor against plain loops over recorded steps."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.randomness import fresh_generators

from moeserve.core import ConfigError, Routing
from moeserve.predictors.base import any_row
from moeserve.predictors.frequency import PRIOR_TOKENS, FrequencyPredictor
from moeserve.predictors.markov import MarkovPredictor

NO_HIDDEN_STATE = torch.zeros(0, 1)  # it looks at the routing alone
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


@pytest.mark.parametrize("make", [FrequencyPredictor, MarkovPredictor])
def test_a_depth_of_none_is_refused(make: type[FrequencyPredictor]) -> None:
    with pytest.raises(ConfigError, match="depth"):
        make({0: 4}, 0)
