"""Memory that an engine and a worker on the same machine share, so that rows are not copied.

The engine makes it without a name (memfd_create(2)): it is gone with the last process that maps it,
however that one ends. The worker opens it as /proc/PID/fd/FD, which the kernel allows to the same
user alone, and proves by the token in it that both mean the same memory: a process number may be
another machine's, or another container's. It is sealed, so that none of the two can cut it short
under the other. Elsewhere than on Linux, and where it cannot be opened, rows travel in frames.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import sys

import torch
from torch import Tensor

from moeserve.worker_messages import SharedMemory

#: room for rows and results; pages count once they were written
SHARED_BYTES = 64 << 20
TOKEN_BYTES = 16
#: rows begin on whole pages
PAGE_BYTES = 4096
# linux/fcntl.h; Python names them from 3.8 on, on Linux
_ADD_SEALS, _GET_SEALS = 1033, 1034
_SEALED = 0x0001 | 0x0002 | 0x0004  # no more seals, no shrinking, no growing


class SharedRows:
    """offer: what the other side needs to find it."""

    def __init__(self, file: int, num_bytes: int, token: bytes) -> None:
        """Takes over the file."""
        self._file = file
        self.num_bytes = num_bytes
        self.offer = SharedMemory(pid=os.getpid(), fd=file, num_bytes=num_bytes, token=token)
        self._mapping = mmap.mmap(file, num_bytes)
        self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)

    @classmethod
    def create(cls, num_bytes: int) -> SharedRows | None:
        """None where the system has no such memory."""
        if sys.platform != "linux":
            return None
        try:
            file = os.memfd_create("moeserve-rows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:
            return None  # switched off by a seccomp filter, for one
        os.ftruncate(file, num_bytes)
        fcntl.fcntl(file, _ADD_SEALS, _SEALED)
        made = cls(file, num_bytes, secrets.token_bytes(TOKEN_BYTES))
        made._mapping[:TOKEN_BYTES] = made.offer.token
        return made

    @classmethod
    def attach(cls, offer: SharedMemory) -> SharedRows | None:
        """None where the memory cannot be opened or is not the one that was meant."""
        try:
            path = f"/proc/{offer.pid}/fd/{offer.fd}"
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            sealed = fcntl.fcntl(file, _GET_SEALS) & _SEALED == _SEALED
            found = os.fstat(file).st_size
            token = os.pread(file, TOKEN_BYTES, 0)
            if sealed and found == offer.num_bytes and token == offer.token:
                return cls(file, found, token)
        except OSError:  # no memfd: it has no seals
            pass
        os.close(file)
        return None

    def view(self, start: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """[P, H] at byte `start`; None where that is not within the memory, or not aligned."""
        stop = start + shape[0] * shape[1] * dtype.itemsize
        if not TOKEN_BYTES <= start <= stop <= self.num_bytes or start % dtype.itemsize:
            return None
        return self._bytes[start:stop].view(dtype).view(shape)

    def close(self) -> None:
        """The mapping lives as long as a view of it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
