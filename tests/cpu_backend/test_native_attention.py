"""Native attention against float64, and that a row's bits depend on its own context alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native_attention import ROUNDING, Problem, Shape, draw_problem, draw_shape
from support.native_matrices import LEVELS, runtime
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.cpu_backend import _native as native

EACH_LEVEL = pytest.mark.parametrize("isa", LEVELS)
GROUPED = Shape(2, 3, 40, 40, 40, 80, 0, False, torch.float32)


def check(problem: Problem, isa: str, pieces: list[tuple[int, int, int]], threads: int) -> None:
    got = problem.attend(isa, pieces, threads).double()
    references = [problem.reference(*piece) for piece in pieces]
    expected = torch.cat([mixed for mixed, _ in references])
    magnitude = torch.cat([size for _, size in references])
    # Scores are sums of key_dim float32 products; their error is relative in the weights.
    bound = ROUNDING[problem.shape.dtype] * expected.abs() + 4e-6 * magnitude + 1e-7
    excess = (got - expected).abs() - bound
    assert (excess <= 0).all(), f"{problem.shape}, {pieces}: {excess.max():.3e} above the bound"


@EACH_LEVEL
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), num_threads=st.integers(1, 5))
def test_equals_float64(isa: str, seed: int, num_threads: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = draw_shape(rng)
    contexts = [rng.choice([rng.randint(1, 80), rng.randint(1, 700)]) for _ in range(3)]
    pieces = []
    for index, context in enumerate(contexts):
        num_rows = rng.choice([1, rng.randint(1, min(context, 90))])
        pieces.append((index, context - num_rows, context))
    check(draw_problem(shape, contexts, generator), isa, pieces, num_threads)


@EACH_LEVEL
def test_long_contexts(isa: str) -> None:
    rng, generator = fresh_generators()
    for window in (0, 128, 1100):
        shape = replace(GROUPED, window=window, dtype=torch.bfloat16, sinks=True)
        context = rng.randint(2500, 3000)
        pieces = [(0, context - 3, context)]
        check(draw_problem(shape, [context], generator), isa, pieces, threads=3)


@EACH_LEVEL
def test_sharp_scores(isa: str) -> None:
    """Scores in the hundreds: one key takes all, the largest moves from block to block."""
    _, generator = fresh_generators()
    problem = draw_problem(GROUPED, [600], generator, sharpness=100.0)
    got = problem.attend(isa, [(0, 300, 600)]).double()
    expected, magnitude = problem.reference(0, 300, 600)
    assert ((got - expected).abs() <= 1e-3 * magnitude + 1e-6).all()


@EACH_LEVEL
@pytest.mark.parametrize("case", range(6))
def test_bits_of_a_row(isa: str, case: int) -> None:
    """All at once, in chunks, one by one, beside neighbours, on 1 to 5 threads: equal bits."""
    rng, generator = fresh_generators()
    shape = draw_shape(rng)
    context = rng.randint(300, 900) if case else rng.randint(1500, 2000)
    problem = draw_problem(shape, [context, 70], generator)
    print(shape, context)
    first = context - 130
    whole = problem.attend(isa, [(0, 0, context)])[first:]
    for num_threads in (2, 3, 5):
        again = problem.attend(isa, [(0, 0, context)], num_threads)[first:]
        assert torch.equal(whole, again), f"{num_threads} threads"
    for most in (1, 7, 64):
        rows, start = [], first
        while start < context:
            stop = min(start + rng.randint(1, most), context)
            pieces = [(0, start, stop), (1, rng.randint(0, 60), 70)]
            batch = problem.attend(isa, pieces, rng.randint(1, 3))
            rows.append(batch[: stop - start])
            start = stop
        assert torch.equal(torch.cat(rows), whole), f"chunks of up to {most}"


@EACH_LEVEL
def test_tokens_to_come_do_not_matter(isa: str) -> None:
    """Whatever stands in the kv of later tokens or before a window, NaN and Inf included."""
    _, generator = fresh_generators()
    for dtype in ROUNDING:
        shape = replace(GROUPED, window=90, sinks=True, dtype=dtype)
        problem = draw_problem(shape, [400], generator)
        slots = problem.sequences[0].slots
        expected = problem.attend(isa, [(0, 200, 400)])[40]  # token 240
        spoilt = problem.entries.clone()
        spoilt[slots[241::2]] = torch.inf
        spoilt[slots[242::2]] = torch.nan
        spoilt[slots[: 241 - 90]] = torch.nan
        got = replace(problem, entries=spoilt).attend(isa, [(0, 200, 400)])
        assert torch.equal(got[40], expected)
        assert got[41:].isnan().all()


@EACH_LEVEL
def test_sinks_at_the_limits(isa: str) -> None:
    """-inf: as if there were none. Huge: nothing else has weight."""
    _, generator = fresh_generators()
    problem = draw_problem(GROUPED, [50], generator)
    pieces = [(0, 0, 50)]
    sinks = torch.full((2, 3), -torch.inf)
    plain = problem.attend(isa, pieces)
    assert torch.equal(replace(problem, sinks=sinks).attend(isa, pieces), plain)
    sinks.fill_(1e30)
    drowned = replace(problem, sinks=sinks).attend(isa, pieces)
    assert (drowned.abs() < 1e-30).all()


def test_no_rows() -> None:
    out = torch.empty(0, 2, 3, 40)
    spans = native.AttentionSpans([])
    queries, entries = torch.empty(0, 2, 3, 40), torch.zeros(5, 2, 80)
    native.attend(runtime(LEVELS[0], 1), spans, queries, entries, 40, 1.0, 0, None, out)


def call(change: Callable[[dict[str, object]], None]) -> None:
    """A call that is right before `change`."""
    arguments: dict[str, object] = {
        "spans": native.AttentionSpans([(0, 2, 3, torch.tensor([4, 0, 1]))]),
        "queries": torch.zeros(2, 2, 3, 40),
        "entries": torch.zeros(5, 2, 80),
        "value_start": 40,
        "scale": 1.0,
        "window": 0,
        "sinks": torch.zeros(2, 3),
        "out": torch.zeros(2, 2, 3, 40),
    }
    native.attend(runtime(LEVELS[-1], 1), **arguments)  # type: ignore[arg-type]
    change(arguments)
    native.attend(runtime(LEVELS[-1], 1), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("queries", torch.zeros(2, 2, 3, 40, dtype=torch.float64), "queries: must be float32"),
        ("queries", torch.zeros(2, 2, 3, 40, dtype=torch.int64), "queries: must be float32"),
        ("queries", torch.zeros(3, 2, 3, 40), "queries: 3 rows, but the spans have 2"),
        ("queries", torch.zeros(2, 2, 40, 3).mT, "queries: its last dimension"),
        ("queries", torch.zeros(2, 2, 120), "queries: shape"),
        ("queries", torch.zeros(2, 2, 3, 81), "queries: wider than a kv row of 80"),
        ("queries", torch.zeros(2, 2, 3, 0), "queries: shape"),
        ("entries", torch.zeros(5, 2, 80, dtype=torch.bfloat16), "entries: must have the dtype"),
        ("entries", torch.zeros(5, 80, 2).mT, "entries: is not contiguous"),
        ("entries", torch.zeros(5, 1, 80), "entries: shape"),
        ("entries", torch.zeros(4, 2, 80), "spans: slot 4 is not within 0..3"),
        ("value_start", 41, "value_start: 41 with 40 numbers"),
        ("value_start", -1, "value_start: -1"),
        ("window", -1, "window: -1"),
        ("scale", float("nan"), "scale: must be finite"),
        ("sinks", torch.zeros(2, 3, dtype=torch.float16), "sinks: must be float32"),
        ("sinks", torch.zeros(3, 2), "sinks: shape"),
        ("out", torch.zeros(2, 2, 3, 40, dtype=torch.bfloat16), "out: must have the dtype"),
        ("out", torch.zeros(2, 2, 3, 80)[..., ::2], "out: is not contiguous"),
        ("out", torch.zeros(1, 2, 3, 40), "out: shape"),
    ],
)
def test_refuses(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(lambda arguments: arguments.update({name: value}))


SLOTS = torch.arange(4)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(1, 1, 4, SLOTS)], "starts at row 1, expected 0"),
        ([(0, 2, 4, SLOTS), (1, 1, 4, SLOTS)], "starts at row 1, expected 2"),
        ([(0, 0, 4, SLOTS)], "0 rows"),
        ([(0, 5, 4, SLOTS)], "5 rows with a context of 4"),
        ([(0, 1, 5, SLOTS)], "shape \\[4\\], expected \\[5\\]"),
        ([(0, 1, 4, SLOTS.int())], "int64"),
        ([(0, 1, 4, torch.arange(8)[::2])], "contiguous"),
        ([(0, 1, 4, SLOTS - 1)], "slot -1"),
        ([(0, 1, 4, [0, 1, 2, 3])], "no array"),
    ],
)
def test_spans_refuse(spans: list[tuple[int, int, int, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.AttentionSpans(spans)


def test_slots_outlive_their_tensor() -> None:
    spans = native.AttentionSpans([(0, 1, 300, torch.arange(300))])
    _ = [torch.full((300,), 2**60) for _ in range(50)]
    queries, entries = torch.zeros(1, 1, 1, 8), torch.ones(300, 1, 16)
    out = torch.empty(1, 1, 1, 8)
    native.attend(runtime(LEVELS[-1], 2), spans, queries, entries, 8, 1.0, 0, None, out)
    assert torch.equal(out, torch.ones_like(out))
