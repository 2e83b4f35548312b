"""Packing and unpacking: what is kept exactly, and how far quantised weights may be off."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native_matrices import (
    BF16,
    F32,
    FP8,
    INT4,
    INT8,
    KINDS,
    MXFP4,
    TEST_LEVELS,
    Kind,
    allocate,
    groups_of,
    random_codes,
    runtime,
    unpack,
    usable_cols,
)
from support.native_matrices import pack_and_unpack as pack
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.cpu_backend import _native as native
from moeserve.experts.weights import dequantize_fp8_blocks, dequantize_mxfp4

EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
INT4_PACKINGS = [kind for kind in INT4 if not kind.weight_only]  # it changes products only
ZERO_POINTS = [kind for kind in INT4_PACKINGS if kind.asymmetric]
SHAPES = [(1, 1), (16, 64), (17, 33), (5, 200), (40, 129)]


def random_bits(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """float32 of any bits: NaN, Inf, numbers below the normal range."""
    return (
        torch.randint(-(2**31), 2**31, shape, generator=generator)
        .to(torch.int32)
        .view(torch.float32)
    )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_kept_bit_by_bit(shape: tuple[int, int]) -> None:
    _, generator = fresh_generators()
    weight = random_bits(shape, generator)
    assert torch.equal(bits(pack(F32, weight)), bits(weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_kept_bit_by_bit(shape: tuple[int, int]) -> None:
    _, generator = fresh_generators()
    weight = (
        torch.randint(-(2**15), 2**15, shape, generator=generator)
        .to(torch.int16)
        .view(torch.bfloat16)
    )
    assert torch.equal(bits(pack(BF16, weight)), bits(weight.float()))


@pytest.mark.parametrize("isa", TEST_LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_types_are_rounded_to_bfloat16_once(isa: str, dtype: torch.dtype) -> None:
    _, generator = fresh_generators()
    weight = random_bits((33, 75), generator)
    if dtype is torch.float16:
        weight = torch.randint(-(2**15), 2**15, (33, 75), generator=generator)
        weight = weight.to(torch.int16).view(torch.float16)
    got, expected = pack(BF16, weight, isa), weight.bfloat16().float()
    assert torch.equal(got.isnan(), weight.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_off_by_half_a_step_at_most(shape: tuple[int, int], dtype: torch.dtype) -> None:
    _, generator = fresh_generators()
    weight = torch.randn(shape, generator=generator) * torch.logspace(-4, 4, shape[0])[:, None]
    weight = weight.to(dtype)
    step = weight.double().abs().amax(dim=1, keepdim=True) / 127
    error = (pack(INT8, weight).double() - weight.double()).abs()
    # 1e-4: the code is rounded from a product in float32, up to 127 * 2^-23 from where it should be
    assert (error <= step * 0.5001).all()


@pytest.mark.parametrize("spread", ["normal", "skewed", "positive", "negative"])
@pytest.mark.parametrize("kind", ZERO_POINTS, ids=lambda kind: kind.name)
@settings(max_examples=10)
@given(rows=st.integers(1, 40), cols=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_zero_points_leave_the_smallest_error_of_the_scales_tried(
    kind: Kind, spread: str, rows: int, cols: int, seed: int
) -> None:
    """The rule of encode_int4.cpp in float64: for each scale its codes, for these the best scale.

    That of factors: test_native_factors.py.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    if spread == "skewed":
        weight = weight.exp() - 0.5
    elif spread != "normal":
        weight = (weight.abs() + 0.1) * (1 if spread == "positive" else -1)
    groups = groups_of(weight, kind.group_cols).double()
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(0)
    reach = (high - low) / 15
    zero = (-low / reach).round().clamp(0, 15).nan_to_num()
    power = groups.square().sum(-1)
    least = power  # what codes of zero would leave
    tie = torch.zeros(power.shape, dtype=torch.bool)  # a number half-way between two codes
    for factor in (1.0, 0.92, 0.84):
        wanted = (groups / (reach * factor)).nan_to_num()
        tie |= ((wanted % 1 - 0.5).abs() < 1e-5).any(-1)
        codes = wanted.round().clamp(-zero, 15 - zero)
        gain = (codes * groups).sum(-1).square() / codes.square().sum(-1)
        least = torch.minimum(least, power - gain.nan_to_num())
    error = (groups_of(pack(kind, weight), kind.group_cols).double() - groups).square().sum(-1)
    # The scale is rounded to bf16, which is off by 2^-8.
    rounding = power * (2**-16 + 1e-6)
    close = error <= least + rounding
    # float32 decides ties in its own way, between codes that leave nearly the same error but want
    # scales that round apart.
    close = close | (tie & (error <= 1.02 * least + rounding))
    # A zero point at a tie may be the neighbour's.
    close = close | (((-low / reach) % 1 - 0.5).abs() < 1e-4).squeeze(-1)
    assert close.all()


@pytest.mark.parametrize("kind", INT4_PACKINGS, ids=lambda kind: kind.name)
def test_int4_is_better_than_reaching_both_ends(kind: Kind) -> None:
    _, generator = fresh_generators()
    weight = torch.randn(64, 1024, generator=generator)
    groups = groups_of(weight, kind.group_cols)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15 if kind.asymmetric else torch.where(-low > high, low, high) / -8
    zero = (-low / scale).round() if kind.asymmetric else torch.tensor(8.0)
    plain = ((groups / scale + zero).round().clamp(0, 15) - zero) * scale
    error = groups_of(pack(kind, weight), kind.group_cols) - groups
    assert error.square().sum() < 0.95 * (plain - groups).square().sum()


def test_int4_codes_of_a_known_group() -> None:
    """Numbers that the codes hit exactly come back exactly, both ends too."""
    symmetric = torch.arange(-8.0, 8.0).repeat(2)[None] * 0.25
    for numbers in (symmetric, -symmetric):  # to the bit but for the division by the factor
        torch.testing.assert_close(pack(INT4_PACKINGS[0], numbers), numbers, rtol=2e-7, atol=0)
    asymmetric = torch.arange(-3.0, 13.0).repeat(2)[None] * 0.5
    assert torch.equal(pack(INT4_PACKINGS[1], asymmetric), asymmetric)


@pytest.mark.parametrize("kind", [INT8, *INT4_PACKINGS], ids=lambda kind: kind.name)
def test_weights_of_zero_and_of_extreme_magnitude(kind: Kind) -> None:
    for magnitude in (0.0, 1e-45, 1e-38, 2.0**-121, 2.0**-119, 1e-30, 1e30, 3e38):
        weight = torch.full((3, 70), magnitude)
        weight[1] *= -1
        weight[2, ::2] *= -1
        got = pack(kind, weight)
        assert got.isfinite().all(), magnitude
        if magnitude == 0 or magnitude >= 1e-30:
            torch.testing.assert_close(got[:2], weight[:2], rtol=2**-8, atol=0)
        assert (got[2].abs() <= magnitude * 1.08).all()  # half a step of 2/15, bf16 scale


@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (17, 96), (40, 320)], ids=str)
def test_mxfp4_equals_dequantize(shape: tuple[int, int]) -> None:
    _, generator = fresh_generators()
    rows, cols = shape
    layout = MXFP4.layout(rows, cols)
    blocks = torch.randint(0, 256, (rows, cols // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 255, (rows, cols // 32), generator=generator, dtype=torch.uint8)
    scales[0, 0] = 0  # 2^-127, below the normal range
    data = allocate(layout.num_bytes)
    row_ids = torch.arange(rows)
    assert native.pack_codes(runtime("scalar"), layout, data, row_ids, blocks, scales)
    expected = dequantize_mxfp4(blocks.unflatten(1, (-1, 16)), scales, torch.float32)
    assert torch.equal(unpack(layout, data), expected)


@pytest.mark.parametrize("shape", [(1, 1), (16, 256), (129, 200), (300, 129)], ids=str)
def test_fp8_equals_dequantize(shape: tuple[int, int]) -> None:
    """Every e4m3 code but NaN; packed rows take the scales of the 128 rows they belong to."""
    _, generator = fresh_generators()
    rows, cols = shape
    layout = FP8.layout(rows, cols)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E
    blocks = torch.rand(-(-rows // 128), -(-cols // 128), generator=generator) / 100
    data = allocate(layout.num_bytes)
    row_scales = blocks.repeat_interleave(128, dim=0)[:rows]
    row_ids = torch.arange(rows)
    assert native.pack_codes(runtime("scalar"), layout, data, row_ids, codes, row_scales)
    expected = dequantize_fp8_blocks(codes.view(torch.float8_e4m3fn), blocks, torch.float32)
    assert torch.equal(unpack(layout, data), expected)


@EACH_KIND
def test_rows_in_any_order_and_in_pieces_give_the_same_bytes(kind: Kind) -> None:
    rng, generator = fresh_generators()
    rows, cols = rng.randint(20, 100), usable_cols(kind, rng.randint(1, 200))
    layout = kind.layout(rows, cols)
    source = (
        random_codes(kind, rows, cols, generator)
        if kind.is_codes
        else (torch.randn(rows, cols, generator=generator),)
    )
    call = native.pack_codes if kind.is_codes else native.pack
    at_once, in_pieces = allocate(layout.num_bytes), allocate(layout.num_bytes)
    assert call(runtime("scalar"), layout, at_once, torch.arange(rows), *source)
    order = torch.randperm(rows, generator=generator)
    for ids in order.split(rng.randint(1, 30)):
        threads = rng.randint(1, 4)
        parts = [array[ids] for array in source]
        assert call(runtime("scalar", threads), layout, in_pieces, ids, *parts)
    assert torch.equal(at_once, in_pieces)


@EACH_KIND
def test_rows_that_stand_apart(kind: Kind) -> None:
    """A slice of a wider matrix, as one rank of a sharded one is, packs as its copy does."""
    _, generator = fresh_generators()
    layout = kind.layout(9, 96)
    source = (
        random_codes(kind, 18, 96, generator)
        if kind.is_codes
        else (torch.randn(18, 96, generator=generator),)
    )
    call = native.pack_codes if kind.is_codes else native.pack
    results = []
    for parts in ([array[::2] for array in source], [array[::2].clone() for array in source]):
        data = allocate(layout.num_bytes)
        assert call(runtime("scalar"), layout, data, torch.arange(9), *parts)
        results.append(data)
    assert torch.equal(*results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [F32, BF16, INT8, *INT4], ids=lambda kind: kind.name)
def test_weights_that_are_not_finite(kind: Kind, bad: float) -> None:
    rng, generator = fresh_generators()
    weight = torch.randn(37, 70, generator=generator)
    row, col = rng.randrange(37), rng.randrange(70)
    weight[row, col] = bad
    layout = kind.layout(37, 70)
    data = allocate(layout.num_bytes)
    good = native.pack(runtime("scalar", 2), layout, data, torch.arange(37), weight)
    assert good == (kind in (F32, BF16))
    if good:
        assert torch.equal(
            unpack(layout, data)[row, col].nan_to_num(), weight[row, col].nan_to_num()
        )


def test_codes_that_are_not_finite() -> None:
    rng, generator = fresh_generators()
    codes, scales = random_codes(MXFP4, 20, 64, generator)
    row_ids = torch.arange(20)
    scales[rng.randrange(20), rng.randrange(2)] = 255
    layout = MXFP4.layout(20, 64)
    data = allocate(layout.num_bytes)
    assert not native.pack_codes(runtime("scalar"), layout, data, row_ids, codes, scales)

    layout = FP8.layout(20, 64)
    data = allocate(layout.num_bytes)
    codes, scales = random_codes(FP8, 20, 64, generator)
    for bad in (0x7F, 0xFF):
        spoilt = codes.clone()
        spoilt[rng.randrange(20), rng.randrange(64)] = bad
        assert not native.pack_codes(runtime("scalar"), layout, data, row_ids, spoilt, scales)
    for bad_scale in (math.nan, math.inf, 3e38):  # the last one has no room for the kernels' 2^8
        spoilt = scales.clone()
        spoilt[rng.randrange(20), 0] = bad_scale
        assert not native.pack_codes(runtime("scalar"), layout, data, row_ids, codes, spoilt)


@EACH_KIND
def test_layout_says_what_it_takes(kind: Kind) -> None:
    layout = kind.layout(33, 96)
    assert (layout.rows, layout.cols, layout.num_panels) == (33, 96, 3)
    assert (layout.asymmetric, layout.weight_only) == (kind.asymmetric, kind.weight_only)
    assert layout.format == kind.number
    assert layout.panel_bytes % 64 == 0
    assert layout.num_bytes == 3 * layout.panel_bytes
    group = {3: kind.group_cols, 4: 32, 5: 128}.get(kind.number, 96)
    assert layout.group_cols == group
    assert layout.num_groups == (0 if kind in (F32, BF16) else -(-96 // group))


def test_memory_is_zeroed_and_aligned() -> None:
    for num_bytes in (0, 1, 4096, 3 << 21):
        data = allocate(num_bytes)
        assert data.shape == (num_bytes,)
        assert not data.any()
        assert num_bytes == 0 or data.data_ptr() % (1 << 21) == 0
        data.fill_(1)
    with pytest.raises(MemoryError):
        native.allocate(1 << 62)
