"""A checkpoint's tensors as the parts of rules: their names, and FP8 blocks taken apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.experts.weights import dequantize_fp8_blocks
from moeserve.models.weight_map import Codes, Convert, Index, Part, Use, WeightRule

#: rows [N, …] to the region they fill, rows in another order or shape; the rest of the shape stays
#: (except for plain targets, of which no codes are taken)
Reorder = Callable[[Tensor], Tensor]
#: inputs under one scale in the packed fp8 format (cpu_backend/csrc/packed.cpp)
FP8_GROUP = 128


@dataclass(frozen=True)
class FfnNames:
    """What a checkpoint calls the parts of an FFN below `model.layers.N.`."""

    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"


DEFAULT_NAMES = FfnNames()


@dataclass(frozen=True)
class Sources:
    """The tensors of a checkpoint by name; knows which of them are stored as FP8 blocks.

    block: rows and columns under one scale, None where config.json names no such storage.
    dtype: the compute dtype.
    """

    names: frozenset[str]
    block: tuple[int, int] | None
    dtype: torch.dtype

    def part(
        self, name: str, shape: tuple[int, ...], index: Index = (), reorder: Reorder | None = None
    ) -> Part:
        """A checkpoint tensor of that shape, dequantised and reordered into target[index]."""
        scale = f"{name}_scale_inv"
        if self.block is not None and scale in self.names:
            blocks = tuple(-(-n // b) for n, b in zip(shape, self.block, strict=True))
            return Part(
                (name, scale),
                (shape, blocks),
                index,
                convert=self._dequantize(self.block, reorder),
                codes=_fp8_codes(self.block, reorder),
            )
        return Part((name,), (shape,), index, convert=None if reorder is None else _one(reorder))

    def _dequantize(self, block: tuple[int, int], reorder: Reorder | None) -> Convert:
        def convert(sources: Sequence[Tensor]) -> Tensor:
            weight, scale = sources
            plain = dequantize_fp8_blocks(weight, scale, self.dtype, block)
            return plain if reorder is None else reorder(plain)

        return convert

    def rule(
        self, target: str, name: str, shape: tuple[int, ...], use: Use = Use.PLAIN
    ) -> WeightRule:
        """The rule for a target that is one checkpoint tensor."""
        return WeightRule(target, shape, (self.part(name, shape),), use=use)

    def linear(
        self, target: str, name: str, shape: tuple[int, int], bias: bool, use: Use = Use.PRODUCT
    ) -> list[WeightRule]:
        """The rules of a linear layer's weight [N, K] and, where it has one, its bias [N]."""
        rules = [self.rule(f"{target}.weight", f"{name}.weight", shape, use)]
        if bias:
            rules.append(self.rule(f"{target}.bias", f"{name}.bias", shape[:1], use.bias))
        return rules


def _fp8_codes(block: tuple[int, int], reorder: Reorder | None) -> Codes | None:
    """The codes of an fp8 tensor with a scale per row and FP8_GROUP columns.

    None: blocks of other numbers of columns do not line up with the groups of the packed format.
    """
    block_rows, block_cols = block
    if block_cols % FP8_GROUP:
        return None

    def take(sources: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        weight, scale = sources
        rows, cols = weight.shape
        groups = -(-cols // FP8_GROUP)
        by_row = scale.float().repeat_interleave(block_rows, dim=0)[:rows]
        scales = by_row.repeat_interleave(block_cols // FP8_GROUP, dim=1)[:, :groups]
        codes = weight.view(torch.uint8)
        return (codes, scales) if reorder is None else (reorder(codes), reorder(scales))

    return Codes("fp8", take)


def _one(reorder: Reorder) -> Convert:
    """A convert that takes a single tensor."""
    return lambda sources: reorder(sources[0])
