"""The sampler against transformers' logits processors, brute force, and its own row alone."""

from __future__ import annotations

import math
import secrets

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moeserve.core import SamplingParams
from moeserve.engine.sampler import Sampler, SampleRow, score, uniform

VOCAB = 700  # above the first candidates of top-p, so that widening happens


def sampler(vocab: int = VOCAB) -> Sampler:
    return Sampler(vocab, [0], torch.device("cpu"))


def row(
    params: SamplingParams, tokens: list[int] | None = None, name: str = "r", prompt: int = 1
) -> SampleRow:
    return SampleRow(name, tokens or [1], prompt, params)


def random_logits(rows: int, spread: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    seed = secrets.randbits(32)
    print(f"logits seed {seed}")
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def draws(logits: torch.Tensor, params: dict[str, float], count: int) -> np.ndarray:
    """Frequencies of `count` samples of one row, each with a seed of its own."""
    first = secrets.randbits(40)
    rows = [row(SamplingParams(seed=first + i, **params), name=str(i)) for i in range(count)]
    tokens = sampler(logits.shape[-1]).sample(logits.expand(count, -1).clone(), rows)
    return np.bincount([t.token_id for t in tokens if t], minlength=logits.shape[-1])


def hf_distribution(logits: torch.Tensor, params: dict[str, float]) -> np.ndarray:
    processors = LogitsProcessorList([TemperatureLogitsWarper(params["temperature"])])
    if params.get("top_k"):
        processors.append(TopKLogitsWarper(int(params["top_k"])))
    if params.get("top_p", 1) < 1:
        processors.append(TopPLogitsWarper(params["top_p"]))
    if params.get("min_p"):
        processors.append(MinPLogitsWarper(params["min_p"]))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    probabilities = processors(ids, logits[None].double()).softmax(-1)[0]
    return probabilities.numpy()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 5.0, "top_p": 0.95},  # nucleus wider than the first candidates
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 2.0, "top_p": 0.8, "min_p": 0.05},  # min-p counts after top-p
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_frequencies_match_transformers_distribution(params: dict[str, float]) -> None:
    logits = random_logits(1)[0]
    count = 20_000
    expected = hf_distribution(logits, params)
    seen = draws(logits, params, count)
    outside = seen[expected == 0].sum()
    # float32 transformers and float64 here may disagree on one borderline token, no more.
    assert outside <= 3 * count * np.sort(expected[expected > 0])[0] + 20
    # Pearson's statistic over cells with enough expected draws; 6 sigma above its mean.
    cells = expected * count >= 5
    statistic = ((seen[cells] - expected[cells] * count) ** 2 / (expected[cells] * count)).sum()
    freedom = cells.sum()
    assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 6


def test_greedy_is_argmax_and_needs_no_seed() -> None:
    logits = random_logits(9)
    rows = [row(SamplingParams(temperature=0), name=str(i)) for i in range(9)]
    tokens = sampler().sample(logits.clone(), rows)
    assert [t.token_id for t in tokens if t] == logits.argmax(-1).tolist()


@settings(max_examples=60)
@given(st.data())
def test_row_does_not_depend_on_its_neighbours(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 8))
    logits = random_logits(count, data.draw(st.sampled_from([0.1, 1.0, 5.0])))
    rows = [
        SampleRow(
            str(i),
            data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)),
            1,
            SamplingParams(
                temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0, 1e-6, 100.0])),
                top_k=data.draw(st.sampled_from([0, 1, 7, 10_000])),
                top_p=data.draw(st.sampled_from([1.0, 0.5, 0.99, 1e-9])),
                min_p=data.draw(st.sampled_from([0.0, 0.2, 1.0])),
                repetition_penalty=data.draw(st.sampled_from([1.0, 1.5])),
                presence_penalty=data.draw(st.sampled_from([0.0, 0.7])),
                seed=data.draw(st.integers(-(2**63), 2**63 - 1)),
                logprobs=data.draw(st.sampled_from([None, 3])),
            ),
        )
        for i in range(count)
    ]
    together = sampler().sample(logits.clone(), rows)
    for i, alone in enumerate(rows):
        assert sampler().sample(logits[i : i + 1].clone(), [alone]) == [together[i]]


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 49), min_size=2, max_size=40),
    st.floats(0.5, 2),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_penalties_match_brute_force(
    tokens: list[int], repetition: float, presence: float, frequency: float
) -> None:
    prompt = len(tokens) // 2
    logits = random_logits(1, vocab=50)
    params = SamplingParams(
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    ids = torch.tensor([tokens])
    expected = RepetitionPenaltyLogitsProcessor(repetition)(ids, logits.clone())
    for token in range(50):
        times = tokens[prompt:].count(token)
        expected[0, token] -= frequency * times + presence * (times > 0)
    subject = sampler(50)
    transformed = logits.clone()
    # Counts grow with the sequence: an earlier step must not change what a later one sees.
    subject.sample(logits.clone(), [row(params, tokens[: prompt + 1], prompt=prompt)])
    subject.sample(transformed, [row(params, tokens, prompt=prompt)])
    torch.testing.assert_close(transformed, expected, rtol=1e-5, atol=1e-5)
    subject.forget("r")
    assert not subject._counts


def test_bias_and_minimum_length() -> None:
    logits = random_logits(1)
    logits[0, 0] = 100  # the end-of-sequence id
    logits[0, 5] = 99
    floor = SamplingParams(temperature=0, min_tokens=2, max_tokens=9, stop_token_ids=(5,))
    first = sampler().sample(logits.clone(), [row(floor, [1, 7], prompt=1)])[0]
    assert first is not None
    assert first.token_id not in (0, 5)
    later = sampler().sample(logits.clone(), [row(floor, [1, 7, 7], prompt=1)])[0]
    assert later is not None
    assert later.token_id == 0
    biased = SamplingParams(temperature=0, logit_bias={0: -100, 3: 100})
    third = sampler().sample(logits.clone(), [row(biased)])[0]
    assert third is not None
    assert third.token_id == (3 if logits[0, 3] + 100 > 99 else 5)


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(1)
    params = SamplingParams(temperature=2.0, top_k=3, seed=4, logprobs=5, logit_bias={9: 30.0})
    sampled = sampler().sample(logits.clone(), [row(params)])[0]
    assert sampled is not None
    assert sampled.logprob is not None
    own = logits[0].double().log_softmax(-1)
    assert sampled.logprob.logprob == pytest.approx(float(own[sampled.token_id]), abs=1e-5)
    assert sampled.logprob.rank == int((own > own[sampled.token_id]).sum()) + 1
    assert [i for i, _ in sampled.logprob.top] == own.topk(5).indices.tolist()
    scored = score(logits.expand(2, -1), [3, 9], 0)
    assert [s.logprob for s in scored] == pytest.approx(own[[3, 9]].tolist(), abs=1e-5)


def test_nan_logits_choose_nothing() -> None:
    logits = random_logits(2)
    logits[1, 17] = torch.nan
    rows = [row(SamplingParams(seed=1), name="a"), row(SamplingParams(seed=1), name="b")]
    good, bad = sampler().sample(logits, rows)
    assert good is not None
    assert bad is None


def test_uniform_is_uniform_and_keyed() -> None:
    seed = secrets.randbits(60)
    grid = np.array([[uniform(seed + s, p) for p in range(200)] for s in range(200)])
    assert grid.min() >= 0
    assert grid.max() < 1
    assert abs(grid.mean() - 0.5) < 6 * math.sqrt(1 / 12 / grid.size)
    # Neighbouring seeds, neighbouring positions and the diagonal between them are unrelated.
    for shifted in (grid[1:, :-1], grid[:-1, 1:], grid[1:, 1:]):
        correlation = np.corrcoef(grid[:-1, :-1].ravel(), shifted.ravel())[0, 1]
        assert abs(correlation) < 6 / math.sqrt(shifted.size)
    assert len(np.unique(grid)) == grid.size
