"""linear: the right product, and the same bits for a row whatever rows stand beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.randomness import fresh_generators

from moeserve.cpu_backend.linear import is_row_invariant, linear

CPU = torch.device("cpu")
SHAPES = [(16, 64), (96, 192), (384, 192), (1, 64), (100, 75), (33, 1), (256, 1024), (1024, 704)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rng, generator = fresh_generators()
    outputs, inner = shape
    weight = torch.randn(outputs, inner, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if rng.random() < 0.5 else None
    for num_rows in (0, 1, 2, rng.randint(3, 40)):
        x = torch.randn(num_rows, inner, generator=generator).to(dtype)
        y = linear(x, weight, bias)
        assert (y.shape, y.dtype) == ((num_rows, outputs), dtype)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        # Summed in float32 and rounded once to dtype.
        summed = 2 * inner * torch.finfo(torch.float32).eps
        rounded = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), expected, rtol=rounded, atol=summed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_see_its_neighbours(
    shape: tuple[int, int], dtype: torch.dtype, num_threads: int
) -> None:
    if not is_row_invariant(dtype, CPU):
        pytest.skip(f"no {dtype} product here that keeps rows apart")
    rng, generator = fresh_generators()
    outputs, inner = shape
    weight = torch.randn(outputs, inner, generator=generator).to(dtype)
    x = torch.randn(300, inner, generator=generator).to(dtype)
    together = linear(x, weight)
    for num_rows in (1, 2, 3, 4, 8, 15, 16, 17, 64, rng.randint(5, 299)):
        start = rng.randint(0, 300 - num_rows)
        part = slice(start, start + num_rows)
        assert torch.equal(linear(x[part], weight), together[part]), f"{num_rows} rows"
