"""Linear layers on the CPU whose result for a row does not depend on the other rows.

torch's float32 product (MKL sgemm) picks its kernel, and with it the order of additions, by the
number of rows: one row, few rows and many rows round differently, so a token's activations would
depend on its batch neighbours. oneDNN's inner product does not, from two rows up, whatever the
number of threads (tests/cpu_backend/test_linear.py tries it on fresh shapes). So float32, bfloat16
and float16 go there, and a single row is doubled. The price is about 15 us per call on small
matrices; docs/architecture.md has the measurements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

ROW_INVARIANT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_row_invariant(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `linear` gives a row the same bits in every batch, as far as it is known."""
    onednn: bool = torch.backends.mkldnn.is_available()
    return device.type == "cpu" and dtype in ROW_INVARIANT_DTYPES and onednn


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
