"""The memory of the paged kv: one row per slot and kv head, in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.models.spec import ModelSpec


class KvLayer:
    """The kv of one layer: [slots, kv_heads, width], width as in the attention's `kv_shape`.

    Written by slot; read by row, where row = slot * kv_heads + head, so that one gather brings the
    keys and values of all heads in the order in which attention multiplies them.
    """

    def __init__(self, slots: Tensor) -> None:
        _, self.num_heads, self.width = slots.shape
        self._slots = slots.flatten(1)  # [slots, kv_heads * width]
        self._rows = slots.flatten(0, 1)  # [slots * kv_heads, width]

    def write(self, slots: Tensor, kv: Tensor) -> None:
        """slots: [T]; kv: [T, kv_heads, ...], `width` numbers per head."""
        self._slots.index_copy_(0, slots, kv.reshape(len(slots), -1))

    def gather(self, rows: Tensor) -> Tensor:
        """rows: [N] -> [N, width]."""
        return self._rows.index_select(0, rows)


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
