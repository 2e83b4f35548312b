"""How checkpoint tensors become the tensors that a model computes with. Data, no byte moved here.

A family declares one WeightRule per tensor of the model; each rule says which checkpoint tensors
fill which region of the target. loader.load_weights does the moving:

    WeightRule("q", (Q, H), (Part(("model.layers.0.self_attn.q_proj.weight",), ((Q, H),)),))

A packed tensor that must change layout is taken apart with `select`, one part per expert, so that
no more than one expert is ever held twice:

    Part(("…gate_up_proj",), ((E, H, 2 * I),), select=(e,), index=(e,), convert=transpose)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from moeserve.cpu_backend.packing import FormatName

#: basic indexing of leading dimensions; () is the whole tensor
Index = tuple[slice | int, ...]
Convert = Callable[[Sequence[Tensor]], Tensor]
TakeCodes = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


class Use(Enum):
    """What a target is for, which decides the form it is kept in."""

    PLAIN = "plain"  # a tensor
    PER_HEAD = "per_head"  # [heads, N, K], a product of each head's own, kept as a tensor
    PRODUCT = "product"  # [..., K], the weight of a linear layer
    SCORES = "scores"  # the same, too delicate to be quantised: routers
    HEAD = "head"  # the same, from hidden states to logits
    GATE_UP = "gate_up"  # [(E,) 2I, H] of experts, or of one dense FFN
    DOWN = "down"  # [(E,) H, I]
    GATE_UP_BIAS = "gate_up_bias"  # [(E,) 2I], beside the matrix
    DOWN_BIAS = "down_bias"  # [(E,) H]

    @property
    def is_matrix(self) -> bool:
        """Whether it is stored in one of several forms; the others keep their numbers."""
        return self not in (Use.PLAIN, Use.PER_HEAD, Use.GATE_UP_BIAS, Use.DOWN_BIAS)

    @property
    def bias(self) -> Use:
        """The use of such a matrix's bias."""
        return {Use.GATE_UP: Use.GATE_UP_BIAS, Use.DOWN: Use.DOWN_BIAS}.get(self, Use.PLAIN)


@dataclass(frozen=True)
class Codes:
    """How to take a part's quantised weights as they are, for a target that keeps their format.

    form: the name of the format.
    take: what `Part.convert` gets -> codes and scales as `packing.PackedWeight.put_codes` wants
        them, their rows in the order of target[index].
    """

    form: FormatName
    take: TakeCodes


@dataclass(frozen=True)
class Part:
    """One region of a target and the checkpoint tensors it is computed from.

    Parts with a `convert` are held once more while they are converted, so keep each below
    256 MiB by `select`; parts without one are copied piece by piece, whatever their size.
    """

    #: checkpoint tensors, in the order `convert` takes them
    names: tuple[str, ...]
    #: the whole shape each of them must have in the checkpoint
    shapes: tuple[tuple[int, ...], ...]
    #: where the result goes in the target
    index: Index = ()
    #: which piece of every named tensor is used
    select: Index = ()
    #: selected tensors, on the target device and in the checkpoint's dtype -> result in the shape
    #: of target[index]; it must not write into its arguments. None: the one tensor as it is
    convert: Convert | None = None
    #: the same without widening, where the tensors hold codes that a target may keep
    codes: Codes | None = None

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.shapes), f"{self.names}: one shape per name"
        assert self.convert is not None or len(self.names) == 1, f"{self.names}: needs a convert"


@dataclass(frozen=True)
class WeightRule:
    """One tensor of the model: its name, shape, dtype and the parts that fill all of it."""

    target: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    #: None: the compute dtype given to load_weights
    dtype: torch.dtype | None = None
    use: Use = Use.PLAIN


def whole(
    target: str, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> WeightRule:
    """The rule for a target that is one checkpoint tensor as it is."""
    return WeightRule(target, shape, (Part((name,), (shape,)),), dtype)


def transpose(sources: Sequence[Tensor]) -> Tensor:
    """Convert for a checkpoint that stores [in, out] where the model wants [out, in]."""
    (source,) = sources
    return source.transpose(-1, -2)
