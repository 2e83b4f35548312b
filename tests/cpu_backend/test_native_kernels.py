"""Products with packed weights, every format on every ISA level that this machine runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native_matrices import (
    FEW_KINDS,
    INT4,
    INT8,
    KINDS,
    LEVELS,
    TEST_LEVELS,
    Kind,
    Packed,
    pack_random,
    product_bound,
    rows_as_used,
    runtime,
)
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.cpu_backend import _native as native

SEEDS = st.integers(0, 2**31)
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
EACH_LEVEL = pytest.mark.parametrize("isa", TEST_LEVELS)


def check_product(packed: Packed, isa: str, x: Tensor, num_threads: int) -> None:
    rows = rows_as_used(packed.kind, isa, x)
    error = (packed.product(isa, x, num_threads).double() - rows @ packed.dense.T).abs()
    excess = error - product_bound(packed, rows)
    assert (excess <= 0).all(), f"off by {error.max():.3e}, {excess.max():.3e} above the bound"


@EACH_LEVEL
@EACH_KIND
@settings(max_examples=12)
@given(
    num_rows=st.integers(1, 70),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 300),
    num_threads=st.integers(1, 4),
    seed=SEEDS,
)
def test_equals_float64(
    kind: Kind, isa: str, num_rows: int, outputs: int, inputs: int, num_threads: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = pack_random(kind, outputs, inputs, generator)
    x = torch.randn(num_rows, packed.layout.cols, generator=generator)
    x *= torch.logspace(-3, 3, num_rows).unsqueeze(1)
    check_product(packed, isa, x, num_threads)


@EACH_LEVEL
@EACH_KIND
def test_shapes_at_the_edges(kind: Kind, isa: str) -> None:
    """One output, one input, whole and broken panels, chunks and groups, more rows than an item."""
    _, generator = fresh_generators()
    shapes = [(1, 1, 1), (1, 200, 3), (70, 1, 2), (16, 128, 1), (17, 129, 5), (64, 31, 12)]
    for outputs, inputs, num_rows in [*shapes, (33, 65, 200)]:
        packed = pack_random(kind, outputs, inputs, generator)
        x = torch.randn(num_rows, packed.layout.cols, generator=generator)
        check_product(packed, isa, x, num_threads=2)


@EACH_LEVEL
@EACH_KIND
def test_a_row_does_not_see_its_neighbours(kind: Kind, isa: str) -> None:
    """The same bits alone, in every size of batch, in every place, on 1 to 4 threads."""
    rng, generator = fresh_generators()
    # Work items of two panels, or of more.
    outputs = rng.choice([rng.randint(1, 170), rng.randint(400, 800)])
    packed = pack_random(kind, outputs, rng.randint(1, 300), generator)
    x = torch.randn(200, packed.layout.cols, generator=generator)
    together = packed.product(isa, x, 1)
    for num_threads in (2, 3, 4):
        assert torch.equal(packed.product(isa, x, num_threads), together)
    for num_rows in (*range(1, 20), 31, 32, 33, 70, 127, 128, 129):
        start = rng.randint(0, 200 - num_rows)
        part = slice(start, start + num_rows)
        got = packed.product(isa, x[part], rng.randint(1, 4))
        assert torch.equal(got, together[part]), f"{num_rows} rows from {start}"


@EACH_KIND
def test_levels_agree(kind: Kind) -> None:
    """Sums of integer products are exact, so vector levels give the same bits.

    The plain level too where sums are exact to the end; where groups have scales of their own it
    adds them up with two roundings, and the others with a fused multiply-add.
    """
    rng, generator = fresh_generators()
    packed = pack_random(kind, 70, rng.randint(100, 700), generator)
    x = torch.randn(9, packed.layout.cols, generator=generator)
    results = {isa: packed.product(isa, x) for isa in LEVELS}
    if kind.quantises_rows:
        exact = kind == INT8 or kind.has_factors
        same = [isa for isa in LEVELS if isa != "scalar" or exact]
        for isa in same:
            assert torch.equal(results[isa], results[same[0]]), isa
    for isa in LEVELS:
        if rows_as_used(kind, isa, x).equal(rows_as_used(kind, "scalar", x)):
            bound = 2 * product_bound(packed, rows_as_used(kind, isa, x))
            assert ((results[isa] - results["scalar"]).double().abs() <= bound).all(), isa


@EACH_LEVEL
@pytest.mark.parametrize("kind", [INT8, *INT4[::4]], ids=lambda kind: kind.name)
def test_sums_that_fill_32_bits(kind: Kind, isa: str) -> None:
    """Every code and every activation at its largest, as many inputs as the format takes."""
    cols = 65536
    layout = kind.layout(3, cols)
    data = torch.from_numpy(native.allocate(layout.num_bytes))
    weight = torch.stack((torch.ones(cols), -torch.ones(cols), torch.ones(cols)))
    weight[2, cols // 2 :] = -1
    assert native.pack(runtime("scalar"), layout, data, torch.arange(3), weight)
    x = torch.cat((weight, -weight)).repeat(3, 1)
    out = torch.empty(18, 3)
    native.PackedMatrix(layout, data).run(runtime(isa), x, out)
    torch.testing.assert_close(out, x @ weight.T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH_LEVEL
@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
def test_types_of_activations(kind: Kind, isa: str, dtype: torch.dtype) -> None:
    """A narrow x is widened without loss; a narrow out is the float32 result rounded once."""
    rng, generator = fresh_generators()
    packed = pack_random(kind, rng.randint(1, 60), rng.randint(1, 200), generator)
    x = torch.randn(rng.randint(1, 20), packed.layout.cols, generator=generator).to(dtype)
    wide = packed.product(isa, x.float())
    assert torch.equal(packed.product(isa, x), wide)
    out = torch.empty(wide.shape, dtype=dtype)
    native.PackedMatrix(packed.layout, packed.data).run(runtime(isa), x, out)
    assert torch.equal(out, wide.to(dtype))


def float16_extremes() -> Tensor:
    """Every float16 number, and float32 numbers that lie between, beyond and below them."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    exact = halves[~halves.isnan()].float()
    tiny = torch.tensor([2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 65519.0, 65520.0, 1e38])
    between = (exact + exact.roll(1)) / 2
    return torch.cat((exact, tiny, -tiny, between[between.isfinite()]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH_LEVEL
def test_rounding_of_results(isa: str, dtype: torch.dtype) -> None:
    """out = x * 1 for numbers that are hard to round, ties and overflow among them."""
    _, generator = fresh_generators()
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
    numbers = torch.cat((float16_extremes(), bits.view(torch.float32)))
    numbers = numbers[~numbers.isnan()].unsqueeze(1)
    layout = native.Layout(0, 1, 1)
    data = torch.from_numpy(native.allocate(layout.num_bytes))
    assert native.pack(runtime("scalar"), layout, data, torch.arange(1), torch.ones(1, 1))
    out = torch.empty(numbers.shape, dtype=dtype)
    native.PackedMatrix(layout, data).run(runtime(isa), numbers, out)
    assert torch.equal(out, numbers.to(dtype))


@EACH_LEVEL
@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
def test_rows_that_stand_apart_and_bias(kind: Kind, isa: str) -> None:
    rng, generator = fresh_generators()
    packed = pack_random(kind, rng.randint(1, 70), rng.randint(1, 100), generator)
    outputs, inputs = packed.layout.rows, packed.layout.cols
    wide = torch.randn(14, inputs + 5, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    matrix = native.PackedMatrix(packed.layout, packed.data, bias)
    frame = torch.full((7, outputs + 3), 5.0)
    matrix.run(runtime(isa, 2), wide[::2, 2 : 2 + inputs], frame[:, 1 : 1 + outputs])
    expected = packed.product(isa, wide[::2, 2 : 2 + inputs].contiguous()) + bias
    assert torch.equal(frame[:, 1 : 1 + outputs], expected)
    assert (frame[:, 0] == 5).all()
    assert (frame[:, 1 + outputs :] == 5).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@EACH_LEVEL
@EACH_KIND
def test_what_is_not_finite_stays_in_its_row(kind: Kind, isa: str, bad: float) -> None:
    rng, generator = fresh_generators()
    packed = pack_random(kind, rng.randint(1, 40), rng.randint(1, 100), generator)
    x = torch.randn(15, packed.layout.cols, generator=generator)
    clean = packed.product(isa, x)
    row = rng.randrange(15)
    x[row, rng.randrange(packed.layout.cols)] = bad
    got = packed.product(isa, x)
    assert not got[row].isfinite().any()
    assert torch.equal(got[:row], clean[:row])
    assert torch.equal(got[row + 1 :], clean[row + 1 :])


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 2.0**-121, 1e30, 3e38])
@EACH_LEVEL
def test_rows_of_extreme_scale_are_quantised_finitely(isa: str, magnitude: float) -> None:
    """A row's scale neither overflows nor divides by zero; tiny rows may become zeros."""
    _, generator = fresh_generators()
    layout = native.Layout(2, 4, 50)
    data = torch.from_numpy(native.allocate(layout.num_bytes))
    weight = torch.full((4, 50), 1e-3)
    assert native.pack(runtime("scalar"), layout, data, torch.arange(4), weight)
    x = torch.where(torch.rand(3, 50, generator=generator) < 0.5, magnitude, -magnitude)
    out = torch.full((3, 4), torch.nan)
    native.PackedMatrix(layout, data).run(runtime(isa), x, out)
    expected = x.double() @ weight.double().T
    atol = max(magnitude * 1e-6, 1e-37)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=atol)


def test_no_rows() -> None:
    _, generator = fresh_generators()
    packed = pack_random(INT8, 5, 7, generator)
    assert packed.product("scalar", torch.empty(0, 7)).shape == (0, 5)


@EACH_LEVEL
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm(isa: str, dtype: torch.dtype, num_threads: int) -> None:
    rng, generator = fresh_generators()
    for rows, cols in ((0, 8), (1, 1), (3, rng.randint(2, 300)), (70, 1000)):
        x = (3 * torch.randn(rows, cols + 2, generator=generator)).to(dtype)[:, :cols]
        weight = torch.randn(cols, generator=generator)
        out = torch.empty(rows, cols, dtype=dtype)
        native.rms_norm(runtime(isa, num_threads), x, weight, 1e-5, out)
        wide = x.double()
        scale = (wide.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
        # Half the spacing of dtype, and float32 arithmetic: a sum of squares of cols / 16 terms.
        rtol = torch.finfo(dtype).eps + (cols / 16 + 10) * 2.0**-23
        torch.testing.assert_close(out.double(), wide * scale * weight, rtol=rtol, atol=1e-7)
        for row in range(min(rows, 4)):
            alone = torch.empty(1, cols, dtype=dtype)
            native.rms_norm(runtime(isa), x[row : row + 1], weight, 1e-5, alone)
            assert torch.equal(alone[0], out[row])
