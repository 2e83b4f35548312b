"""A file that stays open, and whether it still is what was opened."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from moeserve.core import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class OpenFile:
    """A file of weights, open for reading until nobody refers to it.

    Weights are read from mapped memory, so nothing else may write to the file. Replacing it by
    another of its name, or deleting it, harms nothing: what is open stays as it was. Writing into
    it or cutting it short changes weights that are in use, and memory beyond the new end ends the
    process with SIGBUS when it is touched. So whoever is about to touch it asks `check_unchanged`
    first. What happens between the two cannot be helped; the engine's supervisor names it.
    """

    def __init__(self, path: Path) -> None:
        """Raises ModelError where it cannot be opened."""
        self.path = path
        if not path.is_file():
            raise ModelError(f"{path}: no such file")
        try:
            self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self.handle)
        self._stamp = self._stamp_now()

    @property
    def num_bytes(self) -> int:
        return self._stamp[0]

    def read(self, start: int, num_bytes: int) -> bytes:
        """Fewer bytes at the end of the file. Raises ModelError where the system cannot read."""
        try:
            return os.pread(self.handle, num_bytes, start)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read: {error.strerror}") from error

    def read_into(self, start: int, buffer: NDArray[np.uint8]) -> None:
        """Fills all of a buffer. Raises ModelError where the system cannot read, and where the
        file ends before."""
        try:
            found = os.preadv(self.handle, [buffer.data], start)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read: {error.strerror}") from error
        if found != buffer.nbytes:
            raise ModelError(
                f"{self.path}: expected {buffer.nbytes} bytes from {start} on, found {found}",
                hint="fetch or pack the model again, under a new name, and start again",
            )

    def check_unchanged(self) -> None:
        """Raises ModelError if it was written to since it was opened; one system call."""
        now = self._stamp_now()
        if now != self._stamp:
            how = "written to"
            if now[0] != self._stamp[0]:
                how = f"changed from {self._stamp[0]} to {now[0]} bytes"
            raise ModelError(
                f"{self.path}: {how} while it is in use",
                hint="fetch or pack the model again, under a new name, and start again",
            )

    def _stamp_now(self) -> tuple[int, int]:
        """Size and time of the last change of the content, in ns."""
        status = os.fstat(self.handle)
        return status.st_size, status.st_mtime_ns
