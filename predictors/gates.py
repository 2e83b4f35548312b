"""The gates of a model's layers, as predictors apply them to the hidden states of other layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional

from moeserve.core import ModelError

if TYPE_CHECKING:
    from torch import Tensor

#: rows [T, in] to rows [T, out]
RowProduct = Callable[["Tensor"], "Tensor"]
#: makes the product with a weight [out, in] and a bias [out] or none
MakeProduct = Callable[["Tensor", "Tensor | None"], RowProduct]
#: logits [T, E] to what the router ranks experts by, -inf for those it may not choose
Ranking = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class LayerGate:
    """How one MoE layer chooses its experts, given its normed input x [T, H].

    layer: index in the model. norm_weight: [H], of the RMS norm before the layer. weight: [E, H];
    bias: [E] or none. The logits are x @ weight.T + bias, the experts the top_k of
    ranking(logits); ranking None: of the logits themselves.
    """

    layer: int
    top_k: int
    norm_weight: Tensor
    weight: Tensor
    bias: Tensor | None = None
    ranking: Ranking | None = None

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]


def plain_product(weight: Tensor, bias: Tensor | None) -> RowProduct:
    """x @ weight.T + bias through torch, whose rows may round by their number."""
    held = weight.contiguous()

    def product(x: Tensor) -> Tensor:
        return functional.linear(x.to(held.dtype), held, bias)

    return product


def check_gates(gates: Sequence[LayerGate]) -> None:
    """Raises ModelError where gates cannot be applied to each other's layers."""
    if not gates:
        raise ModelError("predictor: the model has no MoE layer")
    first = gates[0]
    shape = (first.num_experts, first.weight.shape[1])
    for gate in gates:
        found = (gate.num_experts, gate.weight.shape[1])
        if found != shape or gate.norm_weight.shape != (shape[1],) or gate.top_k != first.top_k:
            raise ModelError(
                f"predictor: layers {first.layer} and {gate.layer} differ in experts, top_k or "
                "width; gate predictors need them alike",
                hint="use the predictor markov or frequency",
            )


def moved_weight(source: LayerGate, target: LayerGate) -> Tensor:
    """[E, H] float32: the target's gate, for inputs normed for the source layer.

    RMS norm forgets the size of its input, so the target's norm of the state h that gave
    x = h / rms(h) * w_source is x / w_source * w_target. A zero weight has erased its channel.
    """
    norm = source.norm_weight.float()
    ratio = torch.where(norm == 0, 0.0, target.norm_weight.float() / norm)
    return target.weight.float() * ratio
