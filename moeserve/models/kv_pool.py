"""The memory of the paged kv: one entry per slot, in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.models.spec import ModelSpec


class KvLayer:
    """The kv of one layer. entries: [slots, kv_heads, width], as in the attention's `kv_shape`."""

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries
        self.width = entries.shape[2]

    def write(self, slots: Tensor, kv: Tensor) -> None:
        """slots: [T]; kv: [T, kv_heads, ...], `width` numbers per head."""
        self.entries.index_copy_(0, slots, kv.reshape(len(slots), *self.entries.shape[1:]))

    def gather(self, slots: Tensor) -> Tensor:
        """slots: [N] -> [N, kv_heads, width]."""
        return self.entries.index_select(0, slots)


class KvPool:
    """kv memory for `num_blocks` blocks. Which block belongs to whom is the block manager's affair.

    One more slot, `null_slot`, is zero and never written: attention reads it where a sequence has
    no token.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.null_slot = num_blocks * block_tokens
        self.layers = tuple(
            KvLayer(
                torch.zeros(
                    self.null_slot + 1, *layer.attention.kv_shape, dtype=dtype, device=device
                )
            )
            for layer in spec.layers
        )

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_tokens: int, dtype: torch.dtype) -> int:
        """Memory of one block in all layers."""
        numbers = sum(heads * width for heads, width in (s.attention.kv_shape for s in spec.layers))
        return block_tokens * numbers * dtype.itemsize
