"""Native predictors beside those of numpy, which are slower and plainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.randomness import fresh_generators

from moeserve.chores import Chores
from moeserve.core import Routing
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.experts import native_predictors
from moeserve.experts.native_predictors import (
    NativeLookahead,
    NativeResidual,
    native_implementations,
)
from moeserve.predictors import gate_lookahead
from moeserve.predictors.base import Prediction, Predictor
from moeserve.predictors.gate_lookahead import GateLookahead
from moeserve.predictors.gate_residual import GateResidual
from moeserve.predictors.gates import LayerGate
from moeserve.predictors.log_linear import STEPS
from moeserve.predictors.markov import MarkovPredictor, NumpyMarkovModel
from moeserve.predictors.residual_weights import (
    ResidualShape,
    ResidualWeights,
    TrainedPredictor,
    part_shapes,
)

LAYERS = (1, 2, 4, 7)
LEVELS = [level.name for level in _native.isa_levels() if level.usable]


@pytest.fixture(scope="module", params=LEVELS)
def native(request: pytest.FixtureRequest) -> NativeRuntime:
    return NativeRuntime(num_threads=2, isa=request.param)


def draw_gates(
    generator: torch.Generator, hidden: int, experts: int, top_k: int, bias: bool
) -> list[LayerGate]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return [
        LayerGate(
            layer,
            top_k,
            0.5 + torch.rand(hidden, generator=generator),
            normal(experts, hidden),
            normal(experts) if bias else None,
        )
        for layer in LAYERS
    ]


def draw_trained(
    generator: torch.Generator, shape: ResidualShape, hidden: int, experts: int
) -> TrainedPredictor:
    views = {}
    for place, layer in enumerate(LAYERS[:-1]):
        sizes = part_shapes(shape, hidden, experts, min(shape.depth, len(LAYERS) - 1 - place))
        parts = {}
        for name, size in sizes.items():
            parts[name] = torch.randn(size, generator=generator)
            if len(size) > 1:  # sums of about one
                parts[name] /= size[-1 if name not in ("expert_out", "context_out") else -2] ** 0.5
        views[layer] = ResidualWeights(**parts)
    return TrainedPredictor("0" * 64, shape, views, {})


class Pair:
    """Two predictors that are told the same."""

    def __init__(self, fast: Predictor, slow: Predictor, top_k: int) -> None:
        self.fast, self.slow, self.top_k = fast, slow, top_k
        self.found = self.wanted = 0
        self.worst = 0.0

    def begin_step(self, previous_rows: np.ndarray) -> None:
        self.fast.begin_step(previous_rows)
        self.slow.begin_step(previous_rows)

    def predict(self, layer: int, x: torch.Tensor, routing: Routing) -> None:
        fast = self.fast.predict(layer, x, routing).probabilities
        slow = self.slow.predict(layer, x, routing).probabilities
        assert fast.keys() == slow.keys()
        for ahead, expected in slow.items():
            self.worst = max(self.worst, float((fast[ahead] - expected).abs().max()))
            best = fast[ahead].topk(self.top_k).indices
            self.wanted += self.top_k
            # As good as the best, whichever of equals it is: lookahead's chances come in steps.
            border = float(expected.topk(self.top_k).values[-1])
            self.found += int((expected[best] >= border - 1e-6).sum())


def draw_routing(generator: torch.Generator, rows: int, experts: int, top_k: int) -> Routing:
    weights, ids = torch.rand(rows, experts, generator=generator).topk(top_k)
    return Routing(ids, weights)


@pytest.mark.parametrize("bias", [False, True])
def test_lookahead_is_that_of_numpy(
    native: NativeRuntime, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, generator = fresh_generators()
    hidden, experts, top_k = rng.randint(16, 200), rng.randint(4, 40), rng.randint(1, 4)
    depth = rng.randint(1, 4)
    print(f"{hidden=} {experts=} {top_k=} {depth=}")
    gates = draw_gates(generator, hidden, experts, top_k, bias)
    # Products in int8 by both, so that what remains is the arithmetic behind them.
    slow = GateLookahead(gates, depth, native_predictors.native_products(native))
    pair = Pair(NativeLookahead(native, gates, depth), slow, top_k)
    for _ in range(3 * gate_lookahead.CALIBRATE_EVERY + 2):
        rows = rng.choice((1, 1, 2, 30))
        dtype = rng.choice((torch.float32, torch.bfloat16))
        for layer in LAYERS:
            x = torch.randn(rows, hidden, generator=generator).to(dtype)
            pair.predict(layer, x, draw_routing(generator, rows, experts, top_k))
    # A score on the edge of a bin may fall to either side.
    assert pair.found >= 0.98 * pair.wanted
    assert pair.worst < 0.3


def test_residual_is_that_of_numpy(native: NativeRuntime) -> None:
    rng, generator = fresh_generators()
    hidden, experts, top_k = rng.randint(24, 200), rng.randint(4, 40), rng.randint(1, 4)
    shape = ResidualShape(rng.randint(1, 3), rng.randint(1, 20), rng.randint(1, 40))
    depth = rng.randint(1, shape.depth)
    print(f"{hidden=} {experts=} {top_k=} {depth=} {shape=}")
    gates = draw_gates(generator, hidden, experts, top_k, bias=False)
    trained = draw_trained(generator, shape, hidden, experts)
    pair = Pair(
        NativeResidual(native, trained, gates, depth), GateResidual(trained, gates, depth), top_k
    )
    rows = 1
    for _ in range(12):
        before, rows = rows, rng.choice((1, 1, 3, 30))
        if rng.random() < 0.6:  # else nothing is said: as many rows are the same sequences
            pair.begin_step(np.array([rng.randint(-1, before - 1) for _ in range(rows)]))
        dtype = rng.choice((torch.float32, torch.bfloat16))
        # Where its experts have all come in, or predicting does not pay, nobody asks.
        asked = rng.choice((LAYERS, LAYERS, LAYERS[1:], LAYERS[:1] + LAYERS[2:], LAYERS[:1], ()))
        for layer in asked:
            x = (3 * torch.randn(rows, hidden, generator=generator)).to(dtype)
            pair.predict(layer, x, draw_routing(generator, rows, experts, top_k))
    assert pair.found >= 0.9 * pair.wanted  # weights and states in int8
    assert pair.worst < 0.2


@pytest.mark.parametrize("most_waiting", [0, 3, 1000])
def test_markov_is_that_of_numpy(native: NativeRuntime, most_waiting: int) -> None:
    """Also where learning waits, rows come, go and change places, and layers are not asked about.
    Both learn, so a difference would grow."""
    rng, generator = fresh_generators()
    sizes = {layer: rng.randint(4, 40) for layer in LAYERS}
    top_k, depth = rng.randint(1, 4), rng.randint(1, 5)
    print(f"{sizes=} {top_k=} {depth=}")
    fast = native_implementations(native).markov(sizes, depth)
    slow = MarkovPredictor(sizes, depth)
    assert isinstance(fast, MarkovPredictor)
    assert not isinstance(fast.model, NumpyMarkovModel)
    chores = [Chores(most_waiting), Chores(most_waiting)]
    fast.put_off, slow.put_off = (each.put_off for each in chores)
    pair = Pair(fast, slow, top_k)
    rows = 1
    for _ in range(80):
        before, rows = rows, rng.choice((1, 1, 1, 3, 9, 40))
        if rng.random() < 0.6:
            pair.begin_step(np.array([rng.randint(-1, before - 1) for _ in range(rows)]))
        whole = rng.random() < 0.8
        asked = LAYERS if whole else rng.choice((LAYERS[1:], LAYERS[:1] + LAYERS[2:], LAYERS[:1]))
        for layer in asked:
            routing = draw_routing(generator, rows, sizes[layer], top_k)
            pair.predict(layer, torch.zeros(rows, 1), routing)
            if rng.random() < 0.2:
                for each in chores:
                    each.do_while(lambda: True)
    assert pair.worst < 1e-4


def test_native_markov_learns_a_rule(native: NativeRuntime) -> None:
    """Layer 1 always takes the experts of layer 0, moved by one."""
    rng, _ = fresh_generators()
    predictor = native_implementations(native).markov({0: 8, 1: 8}, 1)
    right = 0
    for number in range(600):
        first = torch.tensor([rng.sample(range(8), 2)])
        weights = torch.ones(1, 2)
        found = predictor.predict(0, torch.zeros(1, 1), Routing(first, weights)).probabilities
        second = (first + 1) % 8
        predictor.predict(1, torch.zeros(1, 1), Routing(second, weights))
        if number >= 500:
            right += len(set(found[1].topk(2).indices.tolist()) & set(second[0].tolist()))
    assert right >= 195


def test_markov_refuses_what_does_not_fit(native: NativeRuntime) -> None:
    def model(sizes: list[int], depth: int = 1, context: int = 1) -> _native.MarkovModel:
        return _native.MarkovModel(sizes, depth, context, STEPS.tolist(), 0.01, 9.0)

    for make, message in (
        (lambda: model([]), "sizes: there is no layer"),
        (lambda: model([4, 0]), "sizes: 0 is below 1"),
        (lambda: model([4, 4], depth=3), "depth: 3; 1 to 2"),
        (lambda: model([4, 4], context=0), "num_context: 0; 1 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    found = model([4, 5])
    none = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match="no rows were seen"):
        found.say(native.handle, 0)
    with pytest.raises(ValueError, match="before: row 0 of 0"):
        found.turn(np.zeros(1, np.int64), np.zeros(1, np.int64), 1, 2)
    found.turn(none, none, 2, 2)
    with pytest.raises(ValueError, match="rows: row 3 of 3"):
        found.turn(np.array([3]), np.array([0]), 3, 2)
    with pytest.raises(ValueError, match=r"ids: 4 is not within 0\.\.3"):
        found.see(0, np.full((2, 2), 4))
    with pytest.raises(ValueError, match=r"ids: shape \[1, 2\]"):
        found.see(0, np.zeros((1, 2), np.int64))
    with pytest.raises(ValueError, match="place: 2"):
        found.say(native.handle, 2)
    with pytest.raises(ValueError, match=r"out: shape \[4\], expected \[5\]"):
        found.set_out(0, np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="place: call set_out first"):
        found.say(native.handle, 0)
    found.learn(native.handle)  # there is nothing to learn


def test_a_prediction_holds_until_the_next_from_its_layer(native: NativeRuntime) -> None:
    _, generator = fresh_generators()
    gates = draw_gates(generator, 32, 8, 2, bias=False)
    predictor = NativeLookahead(native, gates, depth=2)

    def predict(layer: int) -> Prediction:
        x = torch.randn(1, 32, generator=generator)
        return predictor.predict(layer, x, draw_routing(generator, 1, 8, 2))

    first = predict(LAYERS[0])
    kept = {layer: chances.clone() for layer, chances in first.probabilities.items()}
    assert list(kept) == [LAYERS[1], LAYERS[2]]
    predict(LAYERS[1])
    for layer, chances in kept.items():
        assert torch.equal(first.probabilities[layer], chances)
    assert predict(LAYERS[-1]).probabilities == {}
    empty = Routing(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert predictor.predict(LAYERS[0], torch.zeros(0, 32), empty).probabilities == {}


def test_rows_that_are_no_numbers_do_no_harm(native: NativeRuntime) -> None:
    _, generator = fresh_generators()
    gates = draw_gates(generator, 32, 8, 2, bias=False)
    shape = ResidualShape(2, 4, 4)
    trained = draw_trained(generator, shape, 32, 8)
    for predictor in (
        NativeLookahead(native, gates, 2),
        NativeResidual(native, trained, gates, 2),
    ):
        for x in (torch.full((2, 32), float("nan")), torch.full((2, 32), float("inf"))):
            for layer in LAYERS:
                predictor.predict(layer, x, draw_routing(generator, 2, 8, 2))
        for layer in LAYERS:
            x = torch.randn(2, 32, generator=generator)
            found = predictor.predict(layer, x, draw_routing(generator, 2, 8, 2)).probabilities
            if isinstance(predictor, NativeLookahead):
                assert all(torch.isfinite(chances).all() for chances in found.values())


def test_what_does_not_fit_is_refused(native: NativeRuntime) -> None:
    _, generator = fresh_generators()
    gates = draw_gates(generator, 32, 8, 2, bias=False)
    predictor = native_implementations(native).lookahead(gates, 2)
    x, routing = torch.zeros(1, 32), draw_routing(generator, 1, 8, 2)
    with pytest.raises(ValueError, match="ids: 8 is not within"):
        predictor.predict(LAYERS[0], x, Routing(torch.full((1, 2), 8), routing.weights))
    with pytest.raises(ValueError, match=r"x: shape \[1, 31\]"):
        predictor.predict(LAYERS[0], torch.zeros(1, 31), routing)
    residual = _native.ResidualPredictor(4, 8, 32)
    product = native_predictors.pack_product(native, torch.zeros(16, 31), None).matrix
    with pytest.raises(ValueError, match="their width is not 32"):
        residual.set_last(0, product)
    with pytest.raises(ValueError, match="num_experts: must be at least 1"):
        _native.ResidualPredictor(4, 0, 32)
    with pytest.raises(ValueError, match="place: 4"):
        residual.set_last(4, product)
