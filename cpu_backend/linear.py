"""Linear layers on the CPU whose result for a row does not depend on the other rows.

torch's float32 product (MKL sgemm) picks its kernel, and with it the order of additions, by the
number of rows: one row, few rows and many rows round differently, so a token's activations would
depend on its batch neighbours. oneDNN's inner product does not, from two rows up, in the version
that torch 2.13 carries; in that of torch 2.11 it does. So it is tried, once per process, and where
it keeps rows apart it is used, with a single row doubled. The price is a reordering of the weights
in every call: about 20 us for a small matrix, twice the time of a large one at one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as functional
from torch import Tensor

from moeserve.cpu_backend.native_linear import NativeLinear
from moeserve.cpu_backend.packing import PackedWeight

#: [N, K] and numbers of rows that have shown every change of kernel met so far
PROBE_SHAPES = ((96, 192), (384, 64), (1024, 704))
PROBE_ROWS = (2, 3, 5, 8, 15, 16, 17, 33, 48, 64)


def is_row_invariant(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `linear` gives a row the same bits in every batch, as far as the probe can tell."""
    return device.type == "cpu" and _inner_product_keeps_rows(dtype)


@cache
def _inner_product_keeps_rows(dtype: torch.dtype) -> bool:
    """Tries oneDNN's inner product; about 10 ms, with the number of threads set by then."""
    if not _onednn_multiplies(dtype):
        return False
    generator = torch.Generator().manual_seed(0)
    for outputs, inner in PROBE_SHAPES:
        weight = torch.randn(outputs, inner, generator=generator).to(dtype)
        x = torch.randn(max(PROBE_ROWS), inner, generator=generator).to(dtype)
        together = _inner_product(x, weight, None)
        for rows in PROBE_ROWS:
            if not torch.equal(_inner_product(x[:rows], weight, None), together[:rows]):
                return False
    return True


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a product for it here: bfloat16 needs AVX-512, float16 more than that."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed, plus bias [N]: [M, N], in the dtype of x."""
    if x.shape[0] == 0 or not is_row_invariant(x.dtype, x.device):
        return functional.linear(x, weight, bias)
    if x.shape[0] == 1:
        return _inner_product(torch.cat((x, x)), weight, bias)[:1]
    return _inner_product(x, weight, bias)


@dataclass(frozen=True)
class Linear:
    """x @ weight.T + bias through torch. weight: [out, in]; bias: [out]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def make_linear(
    weight: Tensor | PackedWeight, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """The linear layer of a weight in either form. out_dtype: of packed ones, instead of x's."""
    if isinstance(weight, PackedWeight):
        return NativeLinear(weight, bias, out_dtype)
    return Linear(weight, bias)


def _inner_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The operator behind torch.compile's CPU linears; no public name reaches it on dense tensors.
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
