"""int4 whose groups have whole factors: how codes and factors are chosen, and exact products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native_matrices import (
    INT4,
    TEST_LEVELS,
    Kind,
    allocate,
    groups_of,
    pack_and_unpack,
    runtime,
)
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.cpu_backend import _native as native

FACTOR_KINDS = [kind for kind in INT4 if kind.has_factors and not kind.weight_only]
EACH_KIND = pytest.mark.parametrize("kind", FACTOR_KINDS, ids=lambda kind: kind.name)


def codes_at(groups: Tensor, scale: Tensor) -> Tensor:
    """groups [N, G, group] float64, scale [N, G, 1]: codes less 8."""
    return (groups / scale).nan_to_num().round().clamp(-8, 7)


def own_scales(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[N, G] float64: the scale of each group by itself, and how much better it is than others."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(0)
    reach = torch.where(-low > high, low, high) / -8
    gains, scales = [], []
    for shrink in (1.0, 0.92, 0.84):
        codes = codes_at(groups, reach * shrink)
        dx, dd = (codes * groups).sum(-1), codes.square().sum(-1)
        gains.append((dx.square() / dd).nan_to_num())
        scales.append((dx / dd).nan_to_num())
    best, second = torch.stack(gains).sort(dim=0, descending=True).values[:2]
    chosen = torch.stack(gains).argmax(0, keepdim=True)
    return torch.stack(scales).gather(0, chosen)[0], best - second


def row_errors_of_the_rule(weight: Tensor, group_cols: int) -> tuple[Tensor, Tensor]:
    """[N]: the squared error that encode_int4.cpp should leave, and where float32 may choose
    otherwise: codes half-way between two, or choices between scales or factors as good as equal."""
    groups = groups_of(weight.double(), group_cols)
    wanted, lead = own_scales(groups)
    power = groups.square().sum(-1)
    tie = (lead < 1e-5 * power) & (lead > 0)
    scale = wanted.abs().amax(1, keepdim=True) / 15
    ratio = (wanted / scale).nan_to_num()
    errors, products, squares = [], [], []
    for step in range(3):
        factor = (ratio.abs().floor() + step).clamp(1, 15) * torch.where(ratio < 0, -1, 1)
        own = (scale * factor).unsqueeze(-1)
        codes = codes_at(groups, own)
        tie |= (((groups / own).nan_to_num() % 1 - 0.5).abs() < 1e-5).any(-1)
        errors.append((groups - codes * own).square().sum(-1))
        products.append(factor * (codes * groups).sum(-1))
        squares.append(factor.square() * codes.square().sum(-1))
    ranked = torch.stack(errors)
    tie |= (ratio.abs() % 1 - 0.5).abs() > 0.5 - 1e-5  # a whole number: which are the next?
    chosen = ranked.argmin(0, keepdim=True)
    dx = torch.stack(products).gather(0, chosen)[0].sum(1)
    dd = torch.stack(squares).gather(0, chosen)[0].sum(1)
    return power.sum(1) - (dx.square() / dd).nan_to_num(), tie.any(1)


@pytest.mark.parametrize("spread", ["normal", "skewed", "outliers"])
@EACH_KIND
@settings(max_examples=10)
@given(rows=st.integers(1, 40), cols=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_rows_have_the_error_of_the_rule(
    kind: Kind, spread: str, rows: int, cols: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    if spread == "skewed":
        weight = weight.exp() - 0.5
    elif spread == "outliers":
        weight *= torch.where(torch.rand(rows, cols, generator=generator) < 0.02, 20.0, 1.0)
    expected, tie = row_errors_of_the_rule(weight, kind.group_cols)
    error = (pack_and_unpack(kind, weight).double() - weight.double()).square().sum(1)
    power = weight.double().square().sum(1)
    allowed = torch.where(tie, 1.1, 1.001) * expected + 1e-6 * power
    assert (error <= allowed).all(), (error / allowed).max()


def row_of_factors(kind: Kind, generator: torch.Generator, rows: int, groups: int) -> Tensor:
    """[rows, K] whole numbers factor * (code - 8): every code in every group, a factor of 15 or -15
    in each row."""
    size = kind.group_cols
    codes = torch.arange(-8, 8).repeat(size // 16).expand(rows, groups, size)
    order = torch.rand(rows, groups, size, generator=generator).argsort(-1)
    factors = torch.randint(1, 16, (rows, groups), generator=generator)
    factors[:, 0] = 15
    factors *= torch.randint(0, 2, (rows, groups), generator=generator) * 2 - 1
    return (codes.gather(-1, order) * factors.unsqueeze(-1)).flatten(1).float()


@EACH_KIND
def test_what_factors_and_codes_can_hit_comes_back(kind: Kind) -> None:
    rng, generator = fresh_generators()
    weight = row_of_factors(kind, generator, rows=40, groups=rng.randint(1, 9)) * 0.0007
    torch.testing.assert_close(pack_and_unpack(kind, weight), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("isa", TEST_LEVELS)
@EACH_KIND
def test_products_are_exact_whole_numbers(kind: Kind, isa: str) -> None:
    """Every factor and every code, on few rows and on many, over several blocks of inputs."""
    rng, generator = fresh_generators()
    weight = row_of_factors(kind, generator, rows=rng.randint(1, 130), groups=rng.randint(1, 60))
    layout = kind.layout(*weight.shape)
    data = allocate(layout.num_bytes)
    row_ids = torch.arange(weight.shape[0])
    assert native.pack(runtime("scalar"), layout, data, row_ids, weight)
    # Scales of 1, whatever rounding left of them: behind a panel's chunks (packed.h).
    panels = data.view(layout.num_panels, layout.panel_bytes)
    start = layout.cols // 8 * 64
    panels[:, start : start + 64] = torch.ones(16).view(torch.uint8)
    matrix = native.PackedMatrix(layout, data)
    for num_rows in (1, rng.randint(2, 10), rng.randint(11, 70)):
        x = torch.randint(-127, 128, (num_rows, layout.cols), generator=generator)
        x[:, 0] = 127  # so that a row's scale is 1
        out = torch.empty(num_rows, layout.rows)
        matrix.run(runtime(isa, 2), x.float(), out)
        assert torch.equal(out, (x @ weight.long().T).float())


def test_finer_groups_and_more_freedom_are_less_error() -> None:
    """Ordered by error: 32, 32 by factors, 64, ...; int8 bounds what an outlier can cost."""
    _, generator = fresh_generators()
    weight = torch.randn(64, 1024, generator=generator)
    errors = [float((pack_and_unpack(kind, weight) - weight).norm()) for kind in FACTOR_KINDS]
    power = float(weight.norm())
    assert errors[0] < 0.085 * power
    assert errors[0] < errors[1] < errors[2] < 0.1 * power
    weight[:, 5] = 1000.0
    rest = torch.ones(1024, dtype=torch.bool)
    rest[:32] = False
    error = (pack_and_unpack(FACTOR_KINDS[0], weight) - weight)[:, rest].abs().amax()
    assert error <= 1000.0 / 120 * 0.51  # half a step of the smallest factor
