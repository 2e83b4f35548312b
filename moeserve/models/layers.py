"""The small parts of a model: plain classes around tensors that are already in place.

Products go through the CPU backend's `linear`, which on the CPU gives a row the same bits whatever
rows stand beside it, and elsewhere is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve.experts.router import Router

#: below that many multiplications torch takes loops of its own instead of oneDNN or MKL
SMALL_PRODUCT = 16**3
#: of which MKL takes the kernels that it takes for any more: 2 on Intel's processors, 4 on AMD's
FEWEST_ROWS = 4
#: that `per_head_into` multiplies at once: what it makes on the way stays small for any prompt
ROWS_AT_ONCE = 256


#: a linear layer, a norm or an FFN: rows of [T, in] to rows of [T, out]
RowFunction = Callable[[Tensor], Tensor]


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x: [T, heads, in], weight: [heads, in, out] -> [T, heads, out].

    Rows are padded to FEWEST_ROWS, and to more than SMALL_PRODUCT multiplications: below, other
    kernels are taken, which round differently.
    """
    padding = max(FEWEST_ROWS, SMALL_PRODUCT // weight[0].numel() + 1) - len(x)
    rows = x.transpose(0, 1)
    if padding > 0:
        rows = F.pad(rows, (0, 0, 0, padding))
    return torch.bmm(rows, weight)[:, : len(x)].transpose(0, 1)


def per_head_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """`per_head` into out [T, heads, out], which need not be contiguous."""
    for first in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        out[rows] = per_head(x[rows], weight)


@dataclass(frozen=True)
class RmsNorm:
    """Root mean square norm (arXiv:1910.07467) over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class Head:
    """The final norm and the head, x [R, H] -> logits [R, V] float32."""

    norm: RowFunction
    linear: RowFunction

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x)).float()


@dataclass(frozen=True)
class GatedFfn:
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202). gate_up: gate rows, then up rows."""

    gate_up: RowFunction
    down: RowFunction
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        # Doubled like every single row in a product, here once: an activation, too, takes another
        # path for a lone row, whose numbers adjoin in memory.
        rows = x if len(x) != 1 else x.expand(2, -1)
        gate, up = self.gate_up(rows).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))[: len(x)]


@dataclass(frozen=True)
class WeighedFfn:
    """An FFN whose output is weighed row by row. gate: x to the weight of its only expert."""

    ffn: RowFunction
    gate: Router

    def __call__(self, x: Tensor) -> Tensor:
        return self.ffn(x) * self.gate(x).weights.to(x.dtype)
