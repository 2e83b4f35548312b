"""Whole experts by the native kernels against experts/reference.py."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native_experts import ACTIVATIONS, Layer, pack_layer, random_routing
from support.native_matrices import (
    F32,
    FEW_KINDS,
    FP8,
    INT8,
    KINDS,
    LEVELS,
    TEST_LEVELS,
    Kind,
    runtime,
    usable_cols,
)
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.core import ExpertSpec, Routing
from moeserve.cpu_backend import _native as native

EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
EACH_LEVEL = pytest.mark.parametrize("isa", TEST_LEVELS)


def check(layer: Layer, isa: str, x: Tensor, routing: Routing, num_threads: int = 1) -> None:
    expected, bound = layer.expected(isa, x, routing)
    error = (layer.run(isa, x, routing, num_threads=num_threads).double() - expected).abs()
    assert (error <= bound).all(), f"off by {error.max():.3e}, {(error / bound).max():.2f} bounds"


def random_layer(
    kind: Kind, generator: torch.Generator, hidden: int = 70, inner: int = 50, **spec: object
) -> Layer:
    sizes = {
        "hidden_size": usable_cols(kind, hidden),
        "intermediate_size": usable_cols(kind, inner),
    }
    return pack_layer(kind, ExpertSpec(num_experts=8, **sizes, **spec), generator)  # type: ignore[arg-type]


@EACH_LEVEL
@EACH_KIND
@settings(max_examples=4)
@given(
    num_tokens=st.integers(1, 40),
    hidden=st.integers(1, 150),
    inner=st.integers(1, 100) | st.integers(257, 400),
    top_k=st.integers(1, 8),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    num_threads=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(
    kind: Kind,
    isa: str,
    num_tokens: int,
    hidden: int,
    inner: int,
    top_k: int,
    activation: str,
    bias: bool,
    num_threads: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = random_layer(kind, generator, hidden, inner, activation=activation, bias=bias)
    x = torch.randn(num_tokens, layer.spec.hidden_size, generator=generator)
    check(layer, isa, x, random_routing(num_tokens, layer.spec, top_k, generator), num_threads)


@EACH_LEVEL
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, bias: bool, isa: str) -> None:
    """Also far out, where exponentials overflow and clamps take hold."""
    _, generator = fresh_generators()
    layer = random_layer(F32, generator, activation=activation, bias=bias)
    for scale in (0.01, 1.0, 30.0, 300.0):
        x = scale * torch.randn(5, 70, generator=generator)
        routing = random_routing(5, layer.spec, 3, generator)
        expected, bound = layer.expected(isa, x, routing)
        error = (layer.run(isa, x, routing).double() - expected).abs()
        # Magnitudes of the hidden state grow with the square of x.
        assert (error <= bound * max(1.0, scale * scale)).all()


@EACH_LEVEL
@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
def test_a_token_does_not_see_its_neighbours(kind: Kind, isa: str) -> None:
    """The same bits alone, in every size of batch, in every place, on 1 to 4 threads."""
    rng, generator = fresh_generators()
    bias = rng.random() < 0.5
    inner = rng.choice([rng.randint(1, 100), rng.randint(257, 400)])  # or in several items
    layer = random_layer(kind, generator, rng.randint(1, 150), inner, bias=bias)
    x = torch.randn(90, layer.spec.hidden_size, generator=generator)
    routing = random_routing(90, layer.spec, rng.randint(1, 5), generator)
    together = layer.run(isa, x, routing)
    for num_threads in (2, 3, 4):
        assert torch.equal(layer.run(isa, x, routing, num_threads=num_threads), together)
    for num_tokens in (1, 1, 2, 3, 4, 7, 8, 9, 16, 31, 64, 70):
        start = rng.randint(0, 90 - num_tokens)
        part = slice(start, start + num_tokens)
        own = Routing(routing.ids[part], routing.weights[part])
        got = layer.run(isa, x[part], own, num_threads=rng.randint(1, 4))
        assert torch.equal(got, together[part]), f"{num_tokens} tokens from {start}"


@EACH_LEVEL
def test_order_of_a_token_s_experts_changes_nothing(isa: str) -> None:
    """They are added up by number."""
    _, generator = fresh_generators()
    layer = random_layer(F32, generator)
    x = torch.randn(6, 70, generator=generator)
    routing = random_routing(6, layer.spec, 4, generator)
    turned = Routing(routing.ids.flip(1).contiguous(), routing.weights.flip(1).contiguous())
    assert torch.equal(layer.run(isa, x, turned), layer.run(isa, x, routing))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
def test_wanted_parts_add_up(kind: Kind, num_threads: int) -> None:
    """Also bit by bit: a part equals the whole where the others' weights are left out."""
    rng, generator = fresh_generators()
    layer = random_layer(kind, generator, bias=True)
    num_tokens = rng.randint(1, 40)
    x = torch.randn(num_tokens, layer.spec.hidden_size, generator=generator)
    routing = random_routing(num_tokens, layer.spec, 3, generator)
    isa = rng.choice(LEVELS)
    owner = torch.randint(0, 3, (8,), generator=generator)
    total = torch.zeros(num_tokens, layer.spec.hidden_size)
    for part in range(3):
        wanted = (owner == part).to(torch.uint8)
        total += layer.run(isa, x, routing, wanted, num_threads)
    whole = layer.run(isa, x, routing)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.run(isa, x, routing, torch.ones(8, dtype=torch.uint8)), whole)
    nothing = layer.run(isa, x, routing, torch.zeros(8, dtype=torch.uint8))
    assert torch.equal(nothing, torch.zeros_like(whole))


@EACH_LEVEL
def test_repeated_experts_and_experts_that_nobody_chose(isa: str) -> None:
    _, generator = fresh_generators()
    for kind in (F32, INT8, FP8):
        layer = random_layer(kind, generator)
        x = torch.randn(11, 70, generator=generator)
        ids = torch.tensor([[3, 3, 5, 3]] * 11)
        ids[4] = 7
        check(layer, isa, x, Routing(ids, torch.rand(11, 4, generator=generator) - 0.5))


@EACH_LEVEL
@pytest.mark.parametrize("num_tokens", [1, 9, 60])
def test_all_tokens_choose_the_same_expert(isa: str, num_tokens: int) -> None:
    _, generator = fresh_generators()
    layer = random_layer(INT8, generator)
    x = torch.randn(num_tokens, 70, generator=generator)
    ids = torch.full((num_tokens, 1), 6)
    check(layer, isa, x, Routing(ids, torch.ones(num_tokens, 1)), num_threads=2)


def test_no_tokens() -> None:
    _, generator = fresh_generators()
    layer = random_layer(F32, generator)
    routing = Routing(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert layer.run("scalar", torch.empty(0, 70), routing).shape == (0, 70)
    out = torch.empty(0, 70)
    nothing = torch.empty(0, 70), routing.ids, routing.weights, None, out
    layer.native.submit(runtime("scalar"), *nothing).wait()


@EACH_LEVEL
def test_rows_that_stand_apart_and_narrow_types(isa: str) -> None:
    _, generator = fresh_generators()
    layer = random_layer(INT8, generator)
    routing = random_routing(9, layer.spec, 2, generator)
    wide = torch.randn(18, 80, generator=generator).bfloat16()
    x = wide[::2, 5:75]
    expected = layer.run(isa, x.float().contiguous(), routing)
    assert torch.equal(layer.run(isa, x, routing), expected)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(9, 70, dtype=dtype)
        layer.native.run(runtime(isa), x, routing.ids, routing.weights, None, out)
        assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@EACH_LEVEL
@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
def test_what_is_not_finite_stays_with_its_token(kind: Kind, isa: str, bad: float) -> None:
    rng, generator = fresh_generators()
    layer = random_layer(kind, generator)
    x = torch.randn(12, layer.spec.hidden_size, generator=generator)
    routing = random_routing(12, layer.spec, 3, generator)
    clean = layer.run(isa, x, routing)
    token = rng.randrange(12)
    x[token, rng.randrange(x.shape[1])] = bad
    got = layer.run(isa, x, routing)
    assert not got[token].isfinite().any()
    others = torch.arange(12) != token
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_submitted_jobs_give_what_run_gives(num_threads: int) -> None:
    rng, generator = fresh_generators()
    layers = [random_layer(kind, generator) for kind in (F32, INT8)]
    own = native.Runtime(rng.choice(LEVELS), num_threads)
    jobs = []
    for i in range(30):
        x = torch.randn(1 + i % 9, 70, generator=generator)
        routing = random_routing(x.shape[0], layers[0].spec, 3, generator)
        jobs.append((layers[i % 2], x, routing, torch.full((x.shape[0], 70), torch.nan)))
    tickets = [
        layer.native.submit(own, x, routing.ids, routing.weights, None, out)
        for layer, x, routing, out in jobs
    ]
    for ticket, (layer, x, routing, out) in zip(tickets, jobs, strict=True):
        ticket.wait()
        assert ticket.done()
        assert torch.equal(out, layer.run(own.isa, x, routing))
    tickets[0].wait()  # once more: returns at once


def test_a_later_ticket_is_done_after_the_earlier_ones() -> None:
    _, generator = fresh_generators()
    layer = random_layer(INT8, generator)
    own = native.Runtime(LEVELS[-1], 2)
    x = torch.randn(20, 70, generator=generator)
    routing = random_routing(20, layer.spec, 4, generator)
    arrays = x, routing.ids, routing.weights, None
    outs = [torch.empty(20, 70) for _ in range(20)]
    tickets = [layer.native.submit(own, *arrays, out) for out in outs]
    tickets[-1].wait()
    assert all(ticket.done() for ticket in tickets)
    for out in outs:
        assert torch.equal(out, outs[0])


def test_a_runtime_that_goes_finishes_what_was_submitted() -> None:
    _, generator = fresh_generators()
    layer = random_layer(INT8, generator)
    own = native.Runtime(LEVELS[-1], 2)
    x = torch.randn(20, 70, generator=generator)
    routing = random_routing(20, layer.spec, 4, generator)
    outs = [torch.empty(20, 70) for _ in range(20)]
    tickets = [layer.native.submit(own, x, routing.ids, routing.weights, None, out) for out in outs]
    del own
    assert all(ticket.done() for ticket in tickets)
    expected = layer.run(LEVELS[-1], x, routing)
    for out in outs:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_from_several_python_threads_at_once(num_threads: int) -> None:
    """One Runtime, one layer, run and submit and dense products in any order."""
    _, generator = fresh_generators()
    layer = random_layer(INT8, generator)
    own = native.Runtime(LEVELS[-1], num_threads)
    inputs = []
    for i in range(5):
        x = torch.randn(1 + 3 * i, 70, generator=generator)
        routing = random_routing(x.shape[0], layer.spec, 1 + i, generator)
        inputs.append((x, routing, layer.run(LEVELS[-1], x, routing)))
    wrong: list[str] = []

    def work(i: int) -> None:
        x, routing, expected = inputs[i]
        for repeat in range(60):
            out = torch.full_like(expected, torch.nan)
            arrays = x, routing.ids, routing.weights, None, out
            if (i + repeat) % 2:
                layer.native.run(own, *arrays)
            else:
                layer.native.submit(own, *arrays).wait()
            if not torch.equal(out, expected):
                wrong.append(f"thread {i}, repeat {repeat}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
