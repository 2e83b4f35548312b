"""What malloc does with large blocks once an engine is there."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes
from moeserve.engine.heap import map_large_blocks

class Info(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallinfo2.restype = Info
if CALL:
    map_large_blocks()
libc.free(libc.malloc(24 << 20))
before = libc.mallinfo2().field4
block = libc.malloc(2 << 20)
print(libc.mallinfo2().field4 - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize("called", [False, True])
def test_a_large_block_has_pages_of_its_own_after_one_was_freed(called: bool) -> None:
    script = SCRIPT.replace("CALL", str(called))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    mapped_bytes = int(run.stdout)
    assert (mapped_bytes >= 2 << 20) == called, mapped_bytes
