"""The memory of the paged kv: one entry per slot, in every layer.

On the CPU a layer's entries are an anonymous mapping: the system gives a page when it is first
written, as zeros, and takes back the pages of blocks that are not to be used for now.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from moeserve.core import ConfigError
from moeserve.cpu_backend import _native
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
        shared: bool = False,
    ) -> None:
        """shared: with something else that gets the memory of blocks that are given back. Then
        there are no huge pages, which would be in memory as a whole for one block that is used.

        Raises ConfigError where the system has no room for such a mapping.
        """
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.null_slot = num_blocks * block_tokens
        shapes = [(self.null_slot + 1, *layer.attention.kv_shape) for layer in spec.layers]
        self._mappings: list[mmap.mmap] = []
        if device.type == "cpu":
            sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
            self._mappings = [_map(num_bytes, shared) for num_bytes in sizes]
            entries = [
                torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape)).view(shape)
                for mapping, shape in zip(self._mappings, shapes, strict=True)
            ]
        else:
            entries = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.layers = tuple(map(KvLayer, entries))
        #: all of them, for calls of several layers; on the CPU
        self.native = _native.KvLayers(entries if device.type == "cpu" else [])

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_tokens: int, dtype: torch.dtype) -> int:
        """Memory of one block in all layers."""
        return sum(_layer_block_bytes(spec, block_tokens, dtype))

    @staticmethod
    def page_blocks(spec: ModelSpec, block_tokens: int, dtype: torch.dtype) -> int:
        """Blocks that make up whole pages in every layer, the fewest."""
        page = mmap.PAGESIZE
        sizes = _layer_block_bytes(spec, block_tokens, dtype)
        return math.lcm(*(page // math.gcd(page, num_bytes) for num_bytes in sizes))

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (from, to); none is both."""
        if not moves:
            return
        sources, targets = torch.tensor(moves).T
        for layer in self.layers:
            blocks = layer.entries[: self.null_slot].view(self.num_blocks, self.block_tokens, -1)
            blocks[targets] = blocks[sources]

    def give_back(self, start: int, stop: int) -> None:
        """Returns the memory of blocks [start, stop) to the system; they are zeros then.

        start: a multiple of `page_blocks`. Only on the CPU.
        """
        for layer, mapping in zip(self.layers, self._mappings, strict=True):
            block_bytes = self.block_tokens * layer.entries[0].nbytes
            # The page where the last block ends has at most the null slot besides: zeros, too.
            num_bytes = -(-(stop - start) * block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            mapping.madvise(mmap.MADV_DONTNEED, start * block_bytes, num_bytes)


def _layer_block_bytes(spec: ModelSpec, block_tokens: int, dtype: torch.dtype) -> list[int]:
    return [block_tokens * math.prod(s.attention.kv_shape) * dtype.itemsize for s in spec.layers]


def _map(num_bytes: int, shared: bool) -> mmap.mmap:
    num_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(
            f"kv_bytes: the system has no {num_bytes} bytes for the kv of one layer: {error}",
            field="kv_bytes",
            hint="lower --kv-bytes or --num-blocks",
        ) from error
    if shared:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping
