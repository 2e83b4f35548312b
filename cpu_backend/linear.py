"""Linear layers on the CPU whose result for a row does not depend on the other rows.

torch's float32 product (MKL sgemm) picks its kernel, and with it the order of additions, by the
number of rows: one row, few rows and many rows round differently, so a token's activations would
depend on its batch neighbours. oneDNN's inner product does not, from two rows up, whatever the
number of threads (tests/cpu_backend/test_linear.py tries it). So the dtypes that oneDNN has for
this processor go there, and a single row is doubled. The price is a reordering of the weights in
every call: about 20 us for a small matrix, twice the time of a large one at one row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def _onednn_dtypes() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    found = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found.add(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        found.add(torch.float16)
    return frozenset(found)


#: What oneDNN multiplies on this processor (bfloat16 needs AVX-512, float16 AVX-512 FP16 or AMX).
ONEDNN_DTYPES = _onednn_dtypes()


def is_row_invariant(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `linear` gives a row the same bits in every batch, as far as it is known."""
    return device.type == "cpu" and dtype in ONEDNN_DTYPES


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed, plus bias [N]: [M, N], in the dtype of x."""
    if x.shape[0] == 0 or not is_row_invariant(x.dtype, x.device):
        return functional.linear(x, weight, bias)
    if x.shape[0] == 1:
        return _inner_product(torch.cat((x, x)), weight, bias)[:1]
    return _inner_product(x, weight, bias)


def _inner_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The operator behind torch.compile's CPU linears; no public name reaches it on dense tensors.
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
