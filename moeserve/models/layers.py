"""The small parts of a model: plain classes around tensors that are already in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """x @ weight.T + bias. weight: [out, in]; bias: [out]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class RmsNorm:
    """Root mean square norm (arXiv:1910.07467) over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class GatedFfn:
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202). gate_up: gate rows, then up rows."""

    gate_up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))


@dataclass(frozen=True)
class SharedExpert:
    """An FFN that every token takes; gate: [1, H], sigmoid(x @ gate) weighs its output."""

    ffn: GatedFfn
    gate: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = self.ffn(x)
        return y if self.gate is None else y.mul_(torch.sigmoid(F.linear(x, self.gate)))
