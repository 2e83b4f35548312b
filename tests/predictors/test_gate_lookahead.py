"""Gate lookahead against the norm and gate of each layer applied one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.core import ConfigError, ModelError, Routing
from moeserve.experts.gates import layer_gate
from moeserve.experts.router import Router, RouterSpec, RouterWeights
from moeserve.predictors.calibration import (
    NUM_BINS,
    OUT_OF_REACH,
    Calibration,
    bins_of,
    margins,
    spread_of,
)
from moeserve.predictors.gate_lookahead import CALIBRATE_EVERY, GateLookahead
from moeserve.predictors.gates import LayerGate
from moeserve.predictors.registry import make_predictor

HIDDEN = 24
LAYERS = (1, 2, 4)


def random_router(spec: RouterSpec, generator: torch.Generator) -> tuple[Router, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = RouterWeights(
        normal(spec.num_experts, spec.hidden_size),
        normal(spec.num_experts) if spec.bias else None,
        0.2 * normal(spec.num_experts) if spec.correction_bias else None,
    )
    return Router(spec, weights), 0.5 + torch.rand(spec.hidden_size, generator=generator)


def rms_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(hidden, weight.shape, weight, 1e-12)


SPECS = {
    "softmax": RouterSpec(num_experts=12, top_k=3, hidden_size=HIDDEN),
    "bias": RouterSpec(num_experts=9, top_k=2, hidden_size=HIDDEN, score="softmax_topk", bias=True),
    "corrected groups": RouterSpec(
        num_experts=12,
        top_k=3,
        hidden_size=HIDDEN,
        score="sigmoid",
        correction_bias=True,
        num_groups=4,
        top_groups=2,
        group_score="top2_sum",
    ),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("rows", [1, 5])
def test_an_unchanged_stream_is_foreseen(spec: RouterSpec, rows: int) -> None:
    """Where nothing is added between layers, the experts with the best chances are those chosen."""
    _, generator = fresh_generators()
    routers = {layer: random_router(spec, generator) for layer in LAYERS}
    predictor = GateLookahead([layer_gate(n, *routers[n]) for n in LAYERS], depth=2)
    hidden = torch.randn(rows, HIDDEN, generator=generator)
    foreseen = {}
    for layer in LAYERS:
        router, norm = routers[layer]
        x = rms_norm(hidden, norm)
        found = predictor.row_chances(layer, x)
        foreseen[layer] = set(found)
        for ahead, chances in found.items():
            later, later_norm = routers[ahead]
            chosen = later(rms_norm(hidden, later_norm)).ids
            for row in range(rows):
                border = np.sort(chances[row])[-spec.top_k]
                assert (chances[row][chosen[row].numpy()] >= border).all()
                assert (chances[row] > border).sum() < spec.top_k
        together = predictor.predict(layer, x, router(x)).probabilities
        for ahead, chances in together.items():
            expected = 1 - np.prod(1 - found[ahead].astype(np.float64), axis=0)
            np.testing.assert_allclose(chances.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert foreseen == {1: {2, 4}, 2: {4}, 4: set()}


def test_margins_against_sorting() -> None:
    rng, generator = fresh_generators()
    num_experts, top_k = rng.randint(3, 12), 2
    scores = torch.randn(4, num_experts, generator=generator).numpy()
    unit = spread_of(scores)
    assert unit == pytest.approx(np.mean([np.std(row) for row in scores]), rel=1e-3)
    for row, found in zip(scores, margins(scores, top_k, unit), strict=True):
        ranked = sorted(row.tolist(), reverse=True)
        border = (ranked[top_k - 1] + ranked[top_k]) / 2
        expected = (row - border) / unit
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        assert (found > 0).sum() == top_k


def test_experts_out_of_reach_lie_in_the_lowest_bin() -> None:
    scores = np.array([[1.0, OUT_OF_REACH, 2.0, OUT_OF_REACH, 3.0]], np.float32)
    unit = spread_of(scores)
    assert unit == pytest.approx(np.std([1.0, 2.0, 3.0]))
    bins = bins_of(scores, 2, unit)
    assert bins[0, [1, 3]].tolist() == [0, 0]
    assert bins[0, 0] < NUM_BINS // 2 <= bins[0, 2] < bins[0, 4]
    # as many in reach as are chosen: all are, and none is told from another by the border
    assert (bins_of(scores, 3, unit)[0, [0, 2, 4]] >= NUM_BINS // 2).all()
    assert bins_of(scores, 3, unit)[0, [1, 3]].tolist() == [0, 0]


def test_calibration_becomes_what_was_seen() -> None:
    """In each row the first expert is chosen with the chance that a curve gives its bin, else the
    second, whose score is the lowest; the table finds the curve."""
    rng, _ = fresh_generators()
    source = np.random.default_rng(rng.randrange(2**32))
    calibration = Calibration.guessed()
    curve = np.linspace(0.05, 0.9, NUM_BINS)
    for _ in range(40):
        bins = np.zeros((4096, 2), np.intp)
        bins[:, 0] = source.integers(1, NUM_BINS, 4096)
        # Of the rows of a bin the curve's share, not about that share: what the table recalls is a
        # few hundred rows of each, of which one bin in 56 would be 0.15 off in one run of 200.
        quantile = np.empty(4096)
        for each in range(1, NUM_BINS):
            (rows,) = np.nonzero(bins[:, 0] == each)
            quantile[rows] = (np.arange(len(rows)) + source.random()) / len(rows)
        chosen = (quantile >= curve[bins[:, 0]]).astype(np.int64)
        calibration.add(bins, chosen[:, None])
    middle = np.arange(4, NUM_BINS - 4)
    found = calibration.chances(middle)
    # at most 0.013 and 0.005 in a hundred runs
    assert np.abs(found - curve[middle]).max() < 0.05
    assert np.abs(found - curve[middle]).mean() < 0.02


def alike(depth: int) -> GateLookahead:
    gates = [LayerGate(n, 2, torch.ones(4), torch.eye(6, 4)) for n in LAYERS]
    return GateLookahead(gates, depth)


def test_chances_follow_what_is_chosen() -> None:
    """The gates are always wrong here: what they say is worth no more than the base rate."""
    rng, generator = fresh_generators()
    predictor = alike(1)
    for _ in range(300 * CALIBRATE_EVERY):
        x = torch.randn(1, 4, generator=generator)
        for layer in LAYERS:
            ids = torch.tensor([rng.sample(range(6), 2)])
            predictor.predict(layer, x, Routing(ids, torch.ones(1, 2)))
    x = torch.randn(200, 4, generator=generator)
    chances = predictor.row_chances(1, x)[2]
    assert abs(chances.mean() - 2 / 6) < 0.05
    assert chances.std() < 0.2  # of sure predictions it would be 0.47


def test_gates_that_differ_are_refused() -> None:
    wide = LayerGate(2, 2, torch.ones(5), torch.eye(6, 5))
    with pytest.raises(ModelError, match="markov"):
        GateLookahead([LayerGate(1, 2, torch.ones(4), torch.eye(6, 4)), wide], 1)
    with pytest.raises(ConfigError, match="depth"):
        alike(0)


def test_predictors_by_name() -> None:
    sizes = {1: 6, 2: 6}
    for name in ("none", "frequency", "markov"):
        assert make_predictor(name, sizes, 2).name == name
    gates = [LayerGate(n, 2, torch.ones(4), torch.eye(6, 4)) for n in (1, 2)]
    assert make_predictor("gate_lookahead", sizes, 2, gates).name == "gate_lookahead"
    with pytest.raises(ConfigError, match="did you mean markov"):
        make_predictor("markow", sizes, 2)
