"""FFN halves of decoder layers: routed experts, shared ones beside them, dense FFNs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.native_experts import Layer, pack_layer
from support.native_matrices import F32, FEW_KINDS, INT8, TEST_LEVELS, Kind, allocate, runtime
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.core import ExpertSpec, Routing
from moeserve.cpu_backend import _native as native

EACH_LEVEL = pytest.mark.parametrize("isa", TEST_LEVELS)
EPS = 1e-5


def random_gate(num_experts: int, hidden: int, generator: torch.Generator) -> native.PackedMatrix:
    layout = F32.layout(num_experts, hidden)
    data = allocate(layout.num_bytes)
    weight = torch.randn(num_experts, hidden, generator=generator) / hidden**0.5
    assert native.pack(runtime("scalar"), layout, data, torch.arange(num_experts), weight)
    return native.PackedMatrix(layout, data)


def make_router(gate: native.PackedMatrix, top_k: int) -> native.Router:
    """Sigmoid scores, rounded to the rows' dtype, as of Qwen2-MoE's shared experts."""
    return native.Router(gate, top_k, 1, False, False, 0.0, 1.0, 1, 1, False, None, True)


@dataclass(frozen=True)
class Part:
    layer: Layer
    router: native.Router | None
    top_k: int

    @classmethod
    def random(cls, kind: Kind, hidden: int, inner: int, num_experts: int, top_k: int | None,
               generator: torch.Generator) -> Part:  # fmt: skip
        """top_k: None for no router."""
        bias = bool(torch.randint(2, (1,), generator=generator))
        spec = ExpertSpec(
            num_experts=num_experts, hidden_size=hidden, intermediate_size=inner, bias=bias
        )
        router = None
        if top_k is not None:
            router = make_router(random_gate(num_experts, hidden, generator), top_k)
        return cls(pack_layer(kind, spec, generator), router, top_k or 1)

    def routing(self, isa: str, normed: Tensor) -> Routing:
        ids = torch.zeros(len(normed), self.top_k, dtype=torch.int64)
        weights = torch.ones(len(normed), self.top_k)
        if self.router is not None:
            self.router.run(runtime(isa), normed, ids, weights)
        return Routing(ids, weights)

    def run(self, isa: str, normed: Tensor) -> Tensor:
        out, chosen = torch.empty_like(normed), self.routing(isa, normed)
        self.layer.native.run(runtime(isa), normed, chosen.ids, chosen.weights, None, out)
        return out


def random_parts(kind: Kind, shared_kind: Kind, hidden: int) -> tuple[list[Part], Tensor]:
    """One or two parts, and a norm's weight [H]."""
    rng, generator = fresh_generators()
    inner = 32 * rng.randint(1, 3)
    routed = Part.random(kind, hidden, inner, 8, rng.randint(1, 4), generator)
    gated = rng.choice([None, 1])
    shared = Part.random(shared_kind, hidden, rng.choice([32, 96, 288]), 1, gated, generator)
    parts = rng.choice([[routed, shared], [shared], [routed]])
    return parts, torch.rand(hidden, generator=generator) + 0.5


def make_ffn(parts: list[Part], norm: Tensor) -> native.FfnLayer:
    return native.FfnLayer(norm.numpy(), EPS, [(p.router, p.layer.native) for p in parts])


@EACH_LEVEL
@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_gives_the_bits_of_its_parts(kind: Kind, isa: str, dtype: torch.dtype) -> None:
    """Whatever the rows and threads; shared experts of another format and width, too."""
    rng, generator = fresh_generators()
    hidden = 32 * rng.randint(1, 4)
    parts, norm = random_parts(kind, rng.choice([kind, kind, *FEW_KINDS]), hidden)
    ffn = make_ffn(parts, norm)
    x = torch.randn(70, hidden, generator=generator).to(dtype)
    normed = torch.empty_like(x)
    native.rms_norm(runtime(isa), x, norm, EPS, normed)
    sums = [part.run(isa, normed) for part in parts]
    expected = x + (sums[0] if len(sums) == 1 else sums[0] + sums[1])
    for num_rows in (1, 2, 3, 5, 8, 17, 64, 70):
        start = rng.randint(0, 70 - num_rows)
        own = x[start : start + num_rows].clone()
        ffn.run(runtime(isa, rng.randint(1, 4)), own)
        assert torch.equal(own, expected[start : start + num_rows]), f"{num_rows} from {start}"


@EACH_LEVEL
def test_equals_the_reference(isa: str) -> None:
    """Beside reference_experts in float64, for each part, of the norm in float64."""
    rng, generator = fresh_generators()
    parts, norm = random_parts(F32, F32, hidden := rng.randint(1, 150))
    x = torch.randn(rng.randint(1, 30), hidden, generator=generator)
    got = x.clone()
    make_ffn(parts, norm).run(runtime(isa, 2), got)
    wide = x.double()
    normed = wide * (wide.square().mean(1, keepdim=True) + EPS).rsqrt() * norm.double()
    expected, bound = wide.clone(), 1e-6 * wide.abs() + 1e-6
    for part in parts:
        y, own_bound = part.layer.expected(isa, normed.float(), part.routing(isa, normed.float()))
        expected += y
        bound += 4 * own_bound  # a norm that is off in its last bit changes every term
    assert ((got.double() - expected).abs() <= bound).all()


def test_uses_are_those_of_the_first_part() -> None:
    _, generator = fresh_generators()
    routed = Part.random(INT8, 64, 32, 8, 3, generator)
    shared = Part.random(INT8, 64, 96, 1, None, generator)
    norm, x = torch.ones(64), torch.randn(9, 64, generator=generator)
    ffn, counts = make_ffn([routed, shared], norm), torch.full((8,), -1, dtype=torch.int32)
    ffn.count_into(counts)
    normed = torch.empty_like(x)
    native.rms_norm(runtime("scalar"), x, norm, EPS, normed)
    ffn.run(runtime("scalar"), x.clone())
    expected = routed.routing("scalar", normed).ids.flatten().bincount(minlength=8)
    assert torch.equal(counts.long(), expected)
    with pytest.raises(ValueError, match="rows: there is no router"):
        make_ffn([shared], norm).count_into(counts[:1])
    with pytest.raises(ValueError, match=r"rows: shape \[7\], expected \[8\]"):
        ffn.count_into(counts[:7])


def test_no_rows() -> None:
    _, generator = fresh_generators()
    ffn = make_ffn([Part.random(F32, 64, 32, 1, None, generator)], torch.ones(64))
    ffn.run(runtime("scalar"), torch.empty(0, 64))


def test_parts_that_do_not_fit_are_refused() -> None:
    _, generator = fresh_generators()
    routed = Part.random(F32, 64, 32, 8, 3, generator)
    norm, handle = torch.ones(64).numpy(), routed.layer.native
    for parts in ([], [(routed.router, handle)] * 3):
        with pytest.raises(ValueError, match=f"parts: {len(parts)} of them; 1 to 2"):
            native.FfnLayer(norm, EPS, parts)
    other = Part.random(F32, 32, 32, 1, None, generator).layer.native
    with pytest.raises(ValueError, match="parts: their outputs differ"):
        native.FfnLayer(norm, EPS, [(routed.router, handle), (None, other)])
    for gate in (random_gate(7, 64, generator), random_gate(8, 32, generator)):
        with pytest.raises(ValueError, match="parts: the number of experts or their shape"):
            native.FfnLayer(norm, EPS, [(make_router(gate, 3), handle)])
    with pytest.raises(ValueError, match=r"norm_weight: shape \[32\], expected \[64\]"):
        native.FfnLayer(norm[:32], EPS, [(routed.router, handle)])
    ffn = native.FfnLayer(norm, EPS, [(routed.router, handle), (None, handle)])
    for x, message in (
        (torch.zeros(2, 32), "x: shape"),
        (torch.zeros(2, 128)[:, :64], "x: is not contiguous"),
        (torch.zeros(2, 64).double(), "x: must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            ffn.run(runtime("scalar"), x)
    handle.clear_record(5)
    with pytest.raises(ValueError, match="parts: expert 5 has no record"):
        ffn.run(runtime("scalar"), torch.zeros(2, 64))
