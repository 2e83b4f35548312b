"""What malloc keeps of memory that was given back to it."""

from __future__ import annotations

import ctypes

#: of malloc.h
M_MMAP_THRESHOLD = -3
#: tensors of a step with many rows are larger, what stays between steps is smaller
LARGE_BLOCK_BYTES = 1 << 20


def map_large_blocks() -> None:
    """Gives every large block pages of its own, which return to the system when it is freed
    (mallopt(3)); nothing where the C library is another.

    By itself glibc raises the size from which it does so, up to 32 MiB, with the first such block
    that is freed. From then on tensors of prompts leave holes between objects that stay: 5 to 20
    MiB, more with every longer prompt, which no plan can know. It costs half a percent of a
    prompt's time and nothing of a decode's (docs/log.md).
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def trim_heap() -> None:
    """Returns free pages to the system (malloc_trim(3)); nothing where the C library is another.

    Reading a model leaves some MiB of them between objects that stay, where no tensor of a step
    finds room.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
