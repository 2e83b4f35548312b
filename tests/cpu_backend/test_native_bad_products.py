"""What products and norms refuse, each with the argument's name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.native_arguments import DATA, INT8, bytes_of, int8_matrix
from support.native_matrices import runtime
from torch import Tensor

from moeserve.cpu_backend import _native as native

TOKENS = torch.zeros(3, 10)


@pytest.mark.parametrize(
    ("data", "bias", "message"),
    [
        (DATA.char(), None, "data: must be uint8"),
        (DATA[:100], None, r"data: shape \[100\]"),
        (bytes_of(DATA.numel() + 1)[1:], None, "data: its address is no multiple of 4"),
        (DATA, torch.zeros(20).double(), "bias: must be float32"),
        (DATA, torch.zeros(19), r"bias: shape \[19\], expected \[20\]"),
        (DATA, torch.zeros(40)[::2], "bias: is not contiguous"),
    ],
)
def test_matrix(data: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8_matrix(data, bias)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.zeros(3, 33).double(), torch.zeros(3, 20), "x: must be float32"),
        (torch.zeros(3, 33), torch.zeros(3, 20).int(), "out: must be float32"),
        (torch.zeros(3, 32), torch.zeros(3, 20), r"x: shape \[3, 32\], expected \[rows, 33\]"),
        (torch.zeros(3, 33), torch.zeros(2, 20), r"out: shape \[2, 20\], expected \[3, 20\]"),
        (torch.zeros(33), torch.zeros(1, 20), r"x: shape \[33\]"),
        (torch.zeros(33, 3).T, torch.zeros(3, 20), "x: its rows are not contiguous"),
        (torch.zeros(3, 33), torch.zeros(20).expand(3, 20), "out: its rows overlap"),
    ],
)
def test_products(x: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8_matrix().run(runtime("scalar"), x, out)


def misaligned(count: int) -> np.ndarray:
    return np.zeros(4 * count + 1, dtype=np.uint8)[1:].view(np.float32)


def test_misaligned_arrays() -> None:
    x, out = np.zeros((3, 33), dtype=np.float32), np.zeros((3, 20), dtype=np.float32)
    with pytest.raises(ValueError, match="x: its address is no multiple of 4; copy it"):
        int8_matrix().run(runtime("scalar"), misaligned(99).reshape(3, 33), out)
    with pytest.raises(ValueError, match="out: its address is no multiple of 4"):
        int8_matrix().run(runtime("scalar"), x, misaligned(60).reshape(3, 20))
    with pytest.raises(ValueError, match="bias: its address is no multiple of 4"):
        native.PackedMatrix(native.Layout(*INT8), DATA, misaligned(20))
    # Aligned to its own numbers is enough: rows of a slice, halves at an odd place.
    int8_matrix().run(runtime("scalar"), torch.zeros(3, 40)[:, 3:36], torch.zeros(3, 21)[:, 1:])
    int8_matrix().run(
        runtime("scalar"), torch.zeros(3, 40).half()[:, 3:36], torch.zeros(3, 21).half()[:, 1:]
    )


def test_arrays_of_another_kind() -> None:
    out = torch.zeros(3, 20)
    with pytest.raises(TypeError):
        int8_matrix().run(runtime("scalar"), [[0.0] * 33], out)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        int8_matrix().run(runtime("scalar"), None, out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "weight", "out", "message"),
    [
        (TOKENS.double(), torch.ones(10), TOKENS, "x: must be float32"),
        (TOKENS, torch.ones(10).double(), TOKENS, "weight: must be float32"),
        (TOKENS, torch.ones(1, 10), TOKENS, "weight: must have one dimension"),
        (TOKENS, torch.ones(20)[::2], TOKENS, "weight: is not contiguous"),
        (TOKENS, torch.ones(9), TOKENS, r"x: shape \[3, 10\], expected \[rows, 9\]"),
        (TOKENS, torch.ones(10), TOKENS.half(), "out: must have the dtype of x"),
        (TOKENS, torch.ones(10), TOKENS[:2], r"out: shape \[2, 10\]"),
    ],
)
def test_rms_norm(x: Tensor, weight: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.rms_norm(runtime("scalar"), x, weight, 1e-6, out)


def test_results_are_not_written_to_read_only_arrays() -> None:
    x, out = np.zeros((3, 33), dtype=np.float32), np.zeros((3, 20), dtype=np.float32)
    x.flags.writeable = False
    int8_matrix().run(runtime("scalar"), x, out)
    out.flags.writeable = False
    with pytest.raises(TypeError, match="out is read-only"):
        int8_matrix().run(runtime("scalar"), x, out)
    weight, norms = np.ones(33, dtype=np.float32), np.zeros_like(x)
    norms.flags.writeable = False
    with pytest.raises(TypeError, match="out is read-only"):
        native.rms_norm(runtime("scalar"), x, weight, 1e-6, norms)
