"""What malloc keeps of memory that was given back to it."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Returns free pages to the system (malloc_trim(3)); nothing where the C library is another.

    Reading a model leaves some MiB of them between objects that stay, where no tensor of a step
    finds room.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
