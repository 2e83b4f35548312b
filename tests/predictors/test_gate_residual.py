"""gate_residual: what it predicts against its formula row by row, what training recovers, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.core import ConfigError, Routing
from moeserve.predictors.gate_residual import GateResidual, unit_state, unit_weights
from moeserve.predictors.gates import LayerGate
from moeserve.predictors.registry import make_predictor
from moeserve.predictors.residual_weights import (
    PARTS,
    ResidualShape,
    ResidualWeights,
    TrainedPredictor,
    about_path,
    load_trained,
    part_shapes,
)
from moeserve.predictors.train_residual import ViewData, forward, train_view

HIDDEN, EXPERTS, TOP_K = 12, 6, 2
LAYERS = (0, 2, 3)
SHAPE = ResidualShape(depth=2, expert_rank=3, context_rank=4)


def random_gates(generator: torch.Generator, layers: tuple[int, ...] = LAYERS) -> list[LayerGate]:
    return [
        LayerGate(
            layer,
            TOP_K,
            0.5 + torch.rand(HIDDEN, generator=generator),
            torch.randn(EXPERTS, HIDDEN, generator=generator),
        )
        for layer in layers
    ]


def random_trained(generator: torch.Generator) -> TrainedPredictor:
    views = {}
    for place, layer in enumerate(LAYERS[:-1]):
        ahead = min(SHAPE.depth, len(LAYERS) - 1 - place)
        sizes = part_shapes(SHAPE, HIDDEN, EXPERTS, ahead)
        parts = {n: torch.randn(size, generator=generator) for n, size in sizes.items()}
        views[layer] = ResidualWeights(**parts)
    return TrainedPredictor("0" * 64, SHAPE, views, {})


def random_routing(rows: int, generator: torch.Generator) -> Routing:
    weights, ids = torch.rand(rows, EXPERTS, generator=generator).topk(TOP_K)
    return Routing(ids, weights)


def plain_chances(
    view: ResidualWeights,
    state: Tensor,
    routing: tuple[Tensor, Tensor],
    past: Tensor | None,
    past_next: Tensor | None,
) -> Tensor:
    """One row, expert by expert. [D * E]."""
    ids, weights = routing
    dense = torch.zeros(EXPERTS)
    for expert, weight in zip(ids.tolist(), (weights / weights.mean()).tolist(), strict=True):
        dense[expert] = weight
    both = torch.cat([state, dense])
    context = view.here @ both + view.context_bias
    if past is not None:
        context = context + view.past @ past
    if past_next is not None:
        context = context + view.past_next @ past_next
    logits = view.linear @ both + view.bias
    logits = logits + torch.nn.functional.silu(context) @ view.context_out
    for expert in ids.tolist():
        inner = torch.nn.functional.silu(view.expert_in[expert] @ state + view.expert_bias[expert])
        logits = logits + dense[expert] * (inner @ view.expert_out[expert])
    return logits.sigmoid()


@pytest.mark.parametrize("rows", [1, 7])
def test_predicts_what_its_formula_says(rows: int) -> None:
    """Over several steps, rows changing places and one of them new each time."""
    rng, generator = fresh_generators()
    trained = random_trained(generator)
    predictor = GateResidual(trained, random_gates(generator), depth=2)
    last: dict[int, Tensor] = {}
    for _ in range(4):
        previous = rng.sample(range(rows), rows)
        previous[rng.randrange(rows)] = -1
        if not last:
            previous = [-1] * rows
        predictor.begin_step(np.array(previous))
        now = {layer: torch.randn(rows, HIDDEN, generator=generator) for layer in LAYERS}
        for place, layer in enumerate(LAYERS):
            routing = random_routing(rows, generator)
            found = predictor.predict(layer, now[layer], routing).probabilities
            assert list(found) == list(LAYERS[place + 1 : place + 3])
            if not found:
                continue
            after = LAYERS[place + 1]
            missed = 1.0
            for row in range(rows):
                known = previous[row] >= 0
                chances = plain_chances(
                    trained.views[layer],
                    unit_state(now[layer])[row],
                    (routing.ids[row], routing.weights[row]),
                    unit_state(last[layer])[previous[row]] if known else None,
                    unit_state(last[after])[previous[row]] if known else None,
                )
                missed = missed * (1 - chances)
            expected = (1 - missed).view(-1, EXPERTS)
            for each, chances in zip(expected, found.values(), strict=True):
                torch.testing.assert_close(chances, each, rtol=1e-3, atol=1e-5)
        last = now


def test_training_computes_what_serving_does() -> None:
    _, generator = fresh_generators()
    trained = random_trained(generator)
    predictor = GateResidual(trained, random_gates(generator), depth=2)
    x, before, before_next = (torch.randn(5, HIDDEN, generator=generator) for _ in range(3))
    routing = random_routing(5, generator)
    for layer, state in ((0, before), (2, before_next), (3, before_next)):
        predictor.row_chances(layer, state, random_routing(5, generator))
    found = predictor.row_chances(0, x, routing)
    dense = torch.zeros(5, EXPERTS).scatter_(1, routing.ids, unit_weights(routing.weights))
    states = [unit_state(each) for each in (x, before, before_next)]
    logits = forward(trained.views[0], states[0], dense, *states[1:])
    expected = logits.sigmoid().view(5, 2, EXPERTS)
    np.testing.assert_allclose(found[2], expected[:, 0].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[3], expected[:, 1].numpy(), rtol=1e-4, atol=1e-5)


def linear_world(
    rows: int, gates: list[LayerGate], generator: torch.Generator
) -> tuple[ViewData, list[Tensor]]:
    """The next layers' states are fixed linear maps of this one and of the row before."""
    states = unit_state(torch.randn(rows, HIDDEN, generator=generator))
    mix = torch.Generator().manual_seed(7)  # the same world for training and for trying
    forth = [torch.randn(HIDDEN, HIDDEN, generator=mix) / HIDDEN**0.5 for _ in range(3)]
    before = torch.cat([states[:1], states[:-1]])
    following = states @ forth[0] + before @ forth[1]
    later = [following, following @ forth[2]]
    ids = [
        (unit_state(state) @ gate.weight.T).topk(TOP_K).indices
        for state, gate in zip(later, gates[1:], strict=True)
    ]
    routing = random_routing(rows, generator)
    follows = torch.ones(rows, dtype=torch.bool)
    follows[0] = False
    data = ViewData(states, unit_state(following), routing.ids, routing.weights, ids, follows)
    return data, ids


def test_training_recovers_a_linear_world() -> None:
    _, generator = fresh_generators()
    gates = random_gates(torch.Generator().manual_seed(3))
    shape = ResidualShape(depth=2, expert_rank=2, context_rank=48)
    data, _ = linear_world(20_000, gates, generator)
    shares: list[float] = []
    view = train_view(data, gates[0], gates[1:], shape, shares.append, epochs=8)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    fresh, ids = linear_world(1000, gates, generator)
    dense = torch.zeros(1000, EXPERTS).scatter_(1, fresh.ids, unit_weights(fresh.weights))
    past = torch.cat([fresh.states[:1], fresh.states[:-1]])
    past_next = torch.cat([fresh.next_states[:1], fresh.next_states[:-1]])
    logits = forward(view, fresh.states, dense, past, past_next).view(-1, 2, EXPERTS)
    for distance, least in ((0, 0.9), (1, 0.85)):
        top = logits[1:, distance].topk(TOP_K).indices
        hits = (top[:, :, None] == ids[distance][1:, None, :]).any(1).float().mean()
        assert hits > least


def test_the_same_rows_train_the_same_weights() -> None:
    gates = random_gates(torch.Generator().manual_seed(3))
    data, _ = linear_world(3000, gates, torch.Generator().manual_seed(5))
    views = [
        train_view(data, gates[0], gates[1:], SHAPE, lambda share: None, epochs=1) for _ in range(2)
    ]
    for name in PARTS:
        assert torch.equal(getattr(views[0], name), getattr(views[1], name))


def test_files_keep_everything(tmp_path: Path) -> None:
    _, generator = fresh_generators()
    trained, gates = random_trained(generator), random_gates(generator)
    file = tmp_path / "predictors.safetensors"
    trained.save(file)
    # It is read by whoever may read the model: no narrower than what the umask leaves.
    assert file.stat().st_mode == about_path(file).stat().st_mode
    by_layer = {gate.layer: gate for gate in gates}
    found = load_trained(file, trained.config_sha256, by_layer)
    assert found.shape == SHAPE
    for layer, view in trained.views.items():
        for name in PARTS:
            assert torch.equal(getattr(view, name), getattr(found.views[layer], name))
    sizes = dict.fromkeys(LAYERS, EXPERTS)
    made = make_predictor("gate_residual", sizes, 2, gates, file, trained.config_sha256)
    assert made.name == "gate_residual"


def broken_version(about: dict[str, object]) -> None:
    about["version"] = 99


def broken_rank(about: dict[str, object]) -> None:
    about["expert_rank"] = 5


def broken_layers(about: dict[str, object]) -> None:
    about["layers"] = [0, 7]


def broken_depth(about: dict[str, object]) -> None:
    del about["depth"]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (broken_version, "version 99"),
        (broken_rank, "is not float32"),
        (broken_layers, "layer 7"),
        (broken_depth, "broken"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, harm, says: str) -> None:  # type: ignore[no-untyped-def]
    _, generator = fresh_generators()
    trained = random_trained(generator)
    gates = {gate.layer: gate for gate in random_gates(generator)}
    file = tmp_path / "predictors.safetensors"
    trained.save(file)
    with pytest.raises(ConfigError, match="another model"):
        load_trained(file, "f" * 64, gates)
    about = json.loads(about_path(file).read_text())
    harm(about)
    about_path(file).write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=says):
        load_trained(file, trained.config_sha256, gates)


def test_missing_and_torn_files_are_refused(tmp_path: Path) -> None:
    _, generator = fresh_generators()
    trained = random_trained(generator)
    gates = {gate.layer: gate for gate in random_gates(generator)}
    file = tmp_path / "predictors.safetensors"
    with pytest.raises(ConfigError, match="predictors train"):
        load_trained(file, trained.config_sha256, gates)
    trained.save(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ConfigError, match="broken"):
        load_trained(file, trained.config_sha256, gates)
    about_path(file).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_trained(file, trained.config_sha256, gates)
    with pytest.raises(ConfigError, match="train"):
        make_predictor("gate_residual", dict.fromkeys(LAYERS, EXPERTS), 2, list(gates.values()))


def test_a_step_resumed_in_its_middle_sees_no_rows_of_the_step_before() -> None:
    _, generator = fresh_generators()
    trained, gates = random_trained(generator), random_gates(generator)

    def ask(predictor: GateResidual, layer: int, x: Tensor, routing: Routing) -> Tensor:
        return predictor.predict(layer, x, routing).probabilities[LAYERS[-1]]

    for rows_after, told in ((2, False), (2, True), (4, True)):
        predictor = GateResidual(trained, gates, SHAPE.depth)
        for layer in (*LAYERS, *LAYERS, LAYERS[0]):
            x = torch.randn(4, HIDDEN, generator=generator)
            predictor.predict(layer, x, random_routing(4, generator))
        if told:
            predictor.begin_step(np.full(rows_after, -1))
        x, routing = (
            torch.randn(rows_after, HIDDEN, generator=generator),
            random_routing(rows_after, generator),
        )
        fresh = GateResidual(trained, gates, SHAPE.depth)
        expected = ask(fresh, LAYERS[1], x, routing)
        assert torch.equal(ask(predictor, LAYERS[1], x, routing), expected)
