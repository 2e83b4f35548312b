"""pregate: chances against the formula token by token, what training recovers, files, steps."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.randomness import fresh_seed

from moeserve.core import ConfigError, Routing
from moeserve.predictors.evaluate import BEFORE, Evaluation, RecordedStep
from moeserve.predictors.gate_residual import unit_state
from moeserve.predictors.gates import LayerGate
from moeserve.predictors.pregate import PregatePredictor, PregateShape, PregateWeights
from moeserve.predictors.pregate_file import (
    ABOUT,
    TrainedPregate,
    gate_norms,
    load_pregate,
    part_shapes,
)
from moeserve.predictors.pregate_training import Block, PregateText, train_pregate, weights_of
from moeserve.predictors.registry import make_predictor
from moeserve.text_windows import recent_tokens

LAYERS, EXPERTS, TOP_K, TOKENS, HIDDEN = (0, 2, 3), 5, 2, 23, 12
SHAPE = PregateShape(window=4, rank=6, heads=2, units=7)
SHA = "0" * 64


def generators() -> tuple[torch.Generator, np.random.Generator]:
    seed = fresh_seed()
    return torch.Generator().manual_seed(seed), np.random.default_rng(seed)


def random_weights(generator: np.random.Generator) -> PregateWeights:
    sizes = part_shapes(SHAPE, TOKENS, len(LAYERS) * EXPERTS)
    parts = {name: generator.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    for name in ("own", "context"):
        parts[name] = parts[name].astype(np.float16)
    return PregateWeights(**parts)


def random_recent(generator: np.random.Generator, rows: int) -> np.ndarray:
    """Texts of any length, some shorter than the window."""
    recent = generator.integers(0, TOKENS, (rows, SHAPE.window))
    for row in recent:
        row[: generator.integers(0, SHAPE.window)] = -1
    return recent


def one_row(weights: PregateWeights, tokens: list[int]) -> np.ndarray:
    """[O] of a text that ends with `tokens`, in float64, one head and token after the other."""
    w = {n: getattr(weights, n).astype(np.float64) for n in weights.__dataclass_fields__}
    rank, per_head = SHAPE.rank, SHAPE.rank // SHAPE.heads
    state = w["own"][tokens[-1], rank:].copy()
    for head in range(SHAPE.heads):
        own = slice(head * per_head, (head + 1) * per_head)
        query = w["own"][tokens[-1], :rank][own]
        powers, values = [], []
        for back, token in enumerate(reversed(tokens)):
            key, value = w["context"][token, :rank][own], w["context"][token, rank:][own]
            powers.append(np.exp(query @ key + w["place"][head, SHAPE.window - 1 - back]))
            values.append(value)
        state[own] += sum(p * v for p, v in zip(powers, values, strict=True)) / sum(powers)
    inner = state @ w["hidden_in"] + w["hidden_bias"]
    inner = inner / (1 + np.exp(-inner))
    logits = state @ w["direct"] + inner @ w["hidden_out"] + w["bias"]
    return 1 / (1 + np.exp(-np.clip(logits, -9, 9)))


@pytest.mark.parametrize("rows", [1, 7, 600])
def test_chances_are_those_of_the_formula(rows: int) -> None:
    _, generator = generators()
    weights = random_weights(generator)
    recent = random_recent(generator, rows)
    found = weights.row_chances(recent)
    for row in generator.permutation(rows)[:40]:
        tokens = [int(t) for t in recent[row] if t >= 0]
        assert found[row] == pytest.approx(one_row(weights, tokens), abs=2e-5)


def test_a_step_is_foreseen_whole_and_repeated_layer_by_layer() -> None:
    _, generator = generators()
    weights = random_weights(generator)
    predictor = PregatePredictor(weights, LAYERS, 1)
    routing = Routing(torch.zeros(3, TOP_K, dtype=torch.int64), torch.ones(3, TOP_K))
    x = torch.zeros(3, HIDDEN)
    assert not predictor.predict(0, x, routing).probabilities, "no tokens were told"
    for rows in (3, 1):
        recent = random_recent(generator, rows)
        expected = 1 - np.prod(1 - weights.row_chances(recent).astype(np.float64), axis=0)
        expected = expected.reshape(len(LAYERS), EXPERTS)
        whole = {n: c.numpy().copy() for n, c in predictor.foresee(recent).probabilities.items()}
        assert list(whole) == list(LAYERS)
        for chances, wanted in zip(whole.values(), expected, strict=True):
            assert chances == pytest.approx(wanted, abs=1e-5)
        for layer, later in zip(LAYERS, [*LAYERS[1:], None], strict=True):
            said = predictor.predict(layer, x, routing).probabilities
            assert list(said) == ([] if later is None else [later])
            assert all((c.numpy() == whole[n]).all() for n, c in said.items())
    assert not predictor.predict(0, x, routing).probabilities, "of a step of which nothing was told"
    assert not predictor.foresee(recent[:0]).probabilities


def test_evaluation_judges_what_was_foreseen() -> None:
    """Every layer is seen from the tokens, by the chances of the formula."""
    _, generator = generators()
    weights = random_weights(generator)
    steps, wanted = [], {place: [] for place in range(len(LAYERS))}
    for _ in range(30):
        recent = random_recent(generator, 1)
        chances = weights.row_chances(recent).reshape(len(LAYERS), EXPERTS)
        layers = {}
        for place, layer in enumerate(LAYERS):
            ids = generator.permutation(EXPERTS)[None, :TOP_K].astype(np.int64)
            layers[layer] = (torch.zeros(1, HIDDEN), Routing(torch.from_numpy(ids), torch.ones(1)))
            likeliest = np.argsort(-chances[place], kind="stable")[:TOP_K]
            wanted[place].append(len(set(likeliest) & set(ids[0])) / TOP_K)
        steps.append(RecordedStep(layers, np.zeros(1, np.int64), recent))
    evaluation = Evaluation(PregatePredictor(weights, LAYERS, 1), LAYERS)
    evaluation.run(steps)
    for place in range(len(LAYERS)):
        figures = evaluation.tallies[BEFORE, place + 1].figures(1)
        assert figures["recall_k"] == pytest.approx(np.mean(wanted[place]))
    assert evaluation.tallies[LAYERS[0], 1].steps == 30


def test_training_finds_what_depends_on_the_tokens() -> None:
    """Layer 0 goes by the token, layer 2 by the one before, layer 3 is the same for all."""
    torch_generator, generator = generators()
    embedding = torch.randn(TOKENS, 32, generator=torch_generator)
    windows = torch.from_numpy(generator.integers(0, TOKENS, (72, 128)))
    table = torch.from_numpy(
        np.stack([generator.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    )
    before = torch.nn.functional.pad(windows, (1, 0), value=0)[:, :-1]
    choices = [table[windows], table[before], table[torch.zeros_like(windows)]]
    choices = [each.flatten(0, 1).short() for each in choices]
    learn = PregateText(windows[:64], [c[: 64 * 128] for c in choices], embedding, EXPERTS)
    shape = PregateShape(window=3, rank=24, heads=2, units=32)
    weights = train_pregate(learn, shape, fresh_seed(), lambda share: None)
    recent = recent_tokens(windows[64:], shape.window).flatten(0, 1).numpy()
    chances = weights.row_chances(recent).reshape(-1, len(LAYERS), EXPERTS)
    recall = []
    for layer, chosen in enumerate(choices):
        likeliest = np.argsort(-chances[:, layer])[:, :TOP_K]
        ids = chosen[64 * 128 :].numpy()
        recall.append((likeliest[..., None] == ids[:, None]).any(2).mean())
    assert min(recall) > 0.9, recall  # by chance 0.4


def test_the_same_text_and_seed_give_the_same_weights() -> None:
    torch_generator, generator = generators()
    embedding = torch.randn(TOKENS, HIDDEN, generator=torch_generator)
    windows = torch.from_numpy(generator.integers(0, TOKENS, (5, 16)))
    choices = [torch.from_numpy(generator.integers(0, EXPERTS, (80, TOP_K))) for _ in LAYERS]
    text = PregateText(windows, choices, embedding, EXPERTS)
    seed = fresh_seed()
    first, again, other = (
        train_pregate(text, SHAPE, each, lambda share: None) for each in (seed, seed, seed + 1)
    )
    for name in part_shapes(SHAPE, TOKENS, 1):
        assert (getattr(first, name) == getattr(again, name)).all()
    assert (first.own != other.own).any()


def test_what_is_trained_is_what_is_served() -> None:
    """The block on windows of embeddings, and its tables on the last tokens."""
    torch_generator, generator = generators()
    embedding = torch.randn(TOKENS, HIDDEN, generator=torch_generator)
    block = Block(SHAPE, HIDDEN, len(LAYERS) * EXPERTS).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch_generator) * 0.5)
        windows = torch.from_numpy(generator.integers(0, TOKENS, (3, 9)))
        expected = block(unit_state(embedding[windows])).sigmoid().flatten(0, 1).numpy()
    recent = recent_tokens(windows, SHAPE.window).flatten(0, 1).numpy()
    found = weights_of(block, embedding).row_chances(recent)
    assert np.abs(found - expected).max() < 0.02  # tables are float16


def gates_of(generator: torch.Generator) -> list[LayerGate]:
    return [
        LayerGate(n, TOP_K, torch.ones(HIDDEN), torch.randn(EXPERTS, HIDDEN, generator=generator))
        for n in LAYERS
    ]


@pytest.fixture
def trained() -> tuple[TrainedPregate, list[LayerGate]]:
    torch_generator, generator = generators()
    gates = gates_of(torch_generator)
    weights = random_weights(generator)
    return TrainedPregate(SHA, SHAPE, LAYERS, gate_norms(gates), weights, {"tokens": 9}), gates


def save(trained: TrainedPregate, path: Path, **changes: Any) -> None:
    about = json.loads(trained.metadata()[ABOUT]) | changes
    save_file(trained.tensors(), path, {ABOUT: json.dumps(about)})


def test_a_file_keeps_all_of_it(
    trained: tuple[TrainedPregate, list[LayerGate]], tmp_path: Path
) -> None:
    first, gates = trained
    path = tmp_path / "pregate.safetensors"
    save(first, path)
    found = load_pregate(path, SHA, gates)
    assert (found.shape, found.layers, found.facts) == (SHAPE, LAYERS, {"tokens": 9})
    recent = random_recent(np.random.default_rng(0), 5)
    assert (found.weights.row_chances(recent) == first.weights.row_chances(recent)).all()
    made = make_predictor("pregate", dict.fromkeys(LAYERS, EXPERTS), 2, gates, path, SHA)
    assert (made.name, made.recent_tokens) == ("pregate", SHAPE.window)
    rounded = [replace(g, weight=g.weight * 1.01) for g in gates]  # as quantised weights are
    load_pregate(path, SHA, rounded)


def test_what_is_not_for_the_model_is_refused(
    trained: tuple[TrainedPregate, list[LayerGate]], tmp_path: Path
) -> None:
    first, gates = trained
    path = tmp_path / "pregate.safetensors"

    def refused(match: str, sha256: str = SHA) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            load_pregate(path, sha256, gates)
        assert str(path) in str(caught.value)

    refused("there is no .*convert with --pregate")
    save(first, path)
    refused("config.json differs", "1" * 64)
    save(first, path, version=2)
    refused("has version 2, this moeserve reads 1")
    save(first, path, layers=[0, 1, 2])
    refused(r"is for layers \[0, 1, 2\], the model has \[0, 2, 3\]")
    save(first, path, rank="many")
    refused("is broken")
    save(first, path, rank=8)
    refused(r"is broken: own is not float16 \[23, 16\]")
    save(replace(first, gate_norms=first.gate_norms[:, ::-1].copy()), path)
    refused("its gates differ")
    bias = first.weights.bias.copy()
    bias[random.Random(fresh_seed()).randrange(len(bias))] = np.nan
    save(replace(first, weights=replace(first.weights, bias=bias)), path)
    refused("bias is not finite")
    save_file({"x": torch.zeros(1)}, path)
    refused("is no pregate")
    path.write_bytes(b"no safetensors")
    refused("cannot be read")
    with pytest.raises(ConfigError, match="has to be trained"):
        make_predictor("pregate", dict.fromkeys(LAYERS, EXPERTS), 2, gates)


def test_shapes_out_of_range() -> None:
    with pytest.raises(ConfigError, match="heads: 4 does not divide rank 6"):
        PregateShape(rank=6)
    with pytest.raises(ConfigError, match="window: 0"):
        PregateShape(window=0)


def test_what_was_foreseen_of_the_step_before_is_not_said_of_the_next() -> None:
    """A step broke off after its first layer; the next one's tokens were not looked at."""
    _, generator = generators()
    predictor = PregatePredictor(random_weights(generator), LAYERS, 2)
    routing = Routing(torch.zeros(1, TOP_K, dtype=torch.int64), torch.ones(1, TOP_K))
    predictor.begin_step(np.array([-1]))
    assert predictor.foresee(random_recent(generator, 1)).probabilities
    assert predictor.predict(LAYERS[0], torch.zeros(1, HIDDEN), routing).probabilities
    predictor.begin_step(np.array([0]))
    assert not predictor.predict(LAYERS[1], torch.zeros(1, HIDDEN), routing).probabilities
