"""Experts computed in parts, in any order, and summed afterwards: the bits of one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.native_experts import pack_layer, random_routing
from support.native_matrices import FEW_KINDS, TEST_LEVELS, Kind, allocate, runtime, usable_cols
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.core import ExpertSpec, Routing
from moeserve.cpu_backend import _native as native
from moeserve.cpu_backend.backend import ExpertJob
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.cpu_backend.native_parts import NativeParts
from moeserve.cpu_backend.native_runtime import NativeRuntime


@pytest.mark.parametrize("isa", TEST_LEVELS)
@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_in_any_order_give_the_bits_of_one_call(
    kind: Kind, isa: str, dtype: torch.dtype
) -> None:
    rng, generator = fresh_generators()
    hidden, inner = usable_cols(kind, rng.randint(1, 150)), usable_cols(kind, rng.randint(1, 90))
    spec = ExpertSpec(
        num_experts=8, hidden_size=hidden, intermediate_size=inner, bias=rng.random() < 0.5
    )
    layer = pack_layer(kind, spec, generator)
    num_tokens, top_k = rng.choice((1, 2, 9, 60)), rng.randint(1, 5)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    routing = random_routing(num_tokens, spec, top_k, generator)
    whole = torch.empty(num_tokens, hidden, dtype=dtype)
    layer.native.run(runtime(isa), x, routing.ids, routing.weights, None, whole)

    rows = x.repeat_interleave(top_k, dim=0)
    ids = routing.ids.reshape(-1, 1)
    parts = native.ExpertParts()
    parts.begin(x, routing.ids)
    for expert in rng.sample(range(8), 8):
        own = (ids[:, 0] == expert).nonzero()[:, 0]
        part = torch.empty(len(own), hidden)
        ones = torch.ones(len(own), 1)
        layer.native.run(runtime(isa, 2), rows[own], ids[own], ones, None, part)
        parts.put(own, part)
    summed = torch.empty_like(whole)
    parts.total(runtime(isa, rng.randint(1, 3)), routing.weights, summed)
    assert torch.equal(summed, whole)


@pytest.mark.parametrize("isa", TEST_LEVELS)
@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
def test_many_rows_of_an_expert_are_computed_like_few(kind: Kind, isa: str) -> None:
    """More than are computed at once (csrc/expert_list.cpp), in one call and in parts that share
    their rounded rows; one part by other kernels, to which these rows are of no use."""
    rng, generator = fresh_generators()
    hidden, inner = usable_cols(kind, rng.randint(20, 60)), usable_cols(kind, rng.randint(20, 60))
    spec = ExpertSpec(
        num_experts=3, hidden_size=hidden, intermediate_size=inner, bias=rng.random() < 0.5
    )
    layer = pack_layer(kind, spec, generator)
    num_tokens, top_k = rng.randint(300, 900), rng.randint(1, 2)
    x = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
    routing = random_routing(num_tokens, spec, top_k, generator)

    def run(rows: slice) -> Tensor:
        out = torch.empty_like(x[rows])
        ids, weights = routing.ids[rows], routing.weights[rows]
        layer.native.run(runtime(isa, 2), x[rows], ids, weights, None, out)
        return out

    whole = run(slice(None))
    pieces = [run(slice(start, start + 50)) for start in range(0, num_tokens, 50)]
    assert torch.equal(torch.cat(pieces), whole)
    parts = native.ExpertParts()
    parts.begin(x, routing.ids)
    first, *others = rng.sample(range(3), 3)
    parts.add(runtime(rng.choice(TEST_LEVELS)), layer.native, [first])
    for expert in others:
        parts.add(runtime(isa, 2), layer.native, [expert])
    found = torch.from_numpy(parts.rows()).clone()
    parts.begin(x, routing.ids)
    parts.add(runtime(isa), layer.native, [0, 1, 2])
    pairs = (routing.ids.flatten() != first).nonzero()[:, 0]
    assert torch.equal(found[pairs], torch.from_numpy(parts.rows())[pairs])
    summed = torch.empty_like(whole)
    parts.total(runtime(isa), routing.weights, summed)
    assert torch.equal(summed, whole)


def test_jobs_use_the_memory_of_those_before_them_and_see_nothing_of_it() -> None:
    """One after the other, of any sizes and after numbers that are none; and two side by side."""
    rng, generator = fresh_generators()
    spec = ExpertSpec(num_experts=6, hidden_size=48, intermediate_size=32)
    backend = NativeBackend(NativeRuntime(2))
    backend.add_layer(0, spec, pack_layer(FEW_KINDS[0], spec, generator))

    def job_of(num_tokens: int, scale: float = 1.0) -> ExpertJob:
        x = scale * torch.randn(num_tokens, 48, generator=generator)
        return ExpertJob(0, x, random_routing(num_tokens, spec, 3, generator))

    def total(parts: NativeParts, experts: Sequence[int]) -> Tensor:
        for part in (experts[:2], experts[2:]):
            parts.add(part)
        return parts.total()

    for num_tokens in (9, 2, 40, 40, 1, 17):
        total(backend.in_parts(job_of(num_tokens, torch.nan)), range(6))
        job = job_of(num_tokens)
        some = rng.sample(range(6), 4)  # of the others nothing must be found
        assert torch.equal(
            total(backend.in_parts(job), some), backend.run(replace(job, experts=tuple(some)))
        )
    first, second = job_of(7), job_of(8)
    open_parts = backend.in_parts(first)
    open_parts.add(range(3))
    assert torch.equal(total(backend.in_parts(second), range(6)), backend.run(second))
    open_parts.add(range(3, 6))
    assert torch.equal(open_parts.total(), backend.run(first))
    backend.close()


def test_parts_refuse_what_does_not_fit() -> None:
    _, generator = fresh_generators()
    spec = ExpertSpec(num_experts=4, hidden_size=32, intermediate_size=32)
    layer = pack_layer(FEW_KINDS[0], spec, generator).native
    own = runtime(TEST_LEVELS[-1])
    parts = native.ExpertParts()
    x, ids = torch.randn(2, 32, generator=generator), torch.tensor([[0, 5], [1, 2]])
    weights, out = torch.ones(2, 2), torch.empty(2, 32)
    with pytest.raises(ValueError, match=r"ids: shape \[1, 2\]"):
        parts.begin(x, ids[:1])
    with pytest.raises(ValueError, match="ids: -1 is below 0"):
        parts.begin(x, ids - 1)
    with pytest.raises(ValueError, match="ids: must be int64"):
        parts.begin(x, ids.int())
    parts.begin(x[:0], ids[:0])  # no rows are a job, too
    parts.total(own, weights[:0], out[:0])
    parts.begin(x, ids)
    with pytest.raises(ValueError, match=r"ids: 5 is not within 0\.\.3"):
        parts.add(own, layer, [5])
    with pytest.raises(ValueError, match="experts: -1 is below 0"):
        parts.add(own, layer, [-1])
    with pytest.raises(ValueError, match="pairs: 4 is not within the job"):
        parts.put(np.array([4]), out[:1])
    with pytest.raises(ValueError, match=r"results: shape \[2, 32\]"):
        parts.put(np.array([0]), out)
    with pytest.raises(ValueError, match=r"weights: shape \[1, 2\]"):
        parts.total(own, weights[:1], out)
    narrow = pack_layer(FEW_KINDS[0], replace(spec, hidden_size=64), generator).native
    with pytest.raises(ValueError, match="packed: its width is not that of x"):
        parts.add(own, narrow, [0])
    parts.add(own, layer, [3, 17])  # which nobody chose
    parts.add(own, layer, [0, 1, 2])
    parts.put(np.array([1]), out[:1].fill_(2.0))
    parts.total(own, weights, out)
    assert parts.rows().shape == (4, 32)
    torch.testing.assert_close(out, torch.from_numpy(parts.rows()).view(2, 2, 32).sum(1))


def test_a_cleared_record_is_refused_until_it_is_set_again() -> None:
    _, generator = fresh_generators()
    spec = ExpertSpec(num_experts=4, hidden_size=32, intermediate_size=32)
    layer = pack_layer(FEW_KINDS[0], spec, generator)
    x, out = torch.randn(1, 32, generator=generator), torch.empty(1, 32)
    routing = Routing(torch.tensor([[1, 2]]), torch.ones(1, 2))
    layer.native.clear_record(2)
    with pytest.raises(ValueError, match="expert 2 has no record"):
        layer.native.run(runtime("scalar"), x, routing.ids, routing.weights, None, out)
    only_one = torch.tensor([0, 1, 0, 0], dtype=torch.uint8)
    layer.native.run(runtime("scalar"), x, routing.ids, routing.weights, only_one, out)
    layer.native.set_record(2, allocate(layer.native.record_bytes))
    layer.native.run(runtime("scalar"), x, routing.ids, routing.weights, None, out)
    assert torch.isfinite(out).all()
    for expert in (-1, 4):
        with pytest.raises(ValueError, match="out of range"):
            layer.native.clear_record(expert)
