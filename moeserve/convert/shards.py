"""Safetensors files, written tensor by tensor: whole, or not there.

Own writer beside the safetensors package, because that one copies all tensors of a file before it
writes any; a vocabulary alone may be larger than what is left of the memory.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from moeserve.core import ConfigError
from moeserve.models.safetensors_file import DTYPES, LENGTH_BYTES

PIECE_BYTES = 64 << 20
PARTIAL = ".partial"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Source:
    """A tensor that is made when it is written. release: called afterwards."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    release: Callable[[], None] = lambda: None

    @staticmethod
    def of(tensor: Tensor) -> Source:
        return Source(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    path: Path, sources: Mapping[str, Source], metadata: Mapping[str, str] | None = None
) -> None:
    """The format's widest types come first, so that every tensor is aligned.

    Raises ConfigError where the disk is full or cannot be written; nothing is left then.
    """
    order = sorted(sources, key=lambda name: (-sources[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in order:
        source = sources[name]
        stop = position + source.num_bytes
        header[name] = {
            "dtype": DTYPE_NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // LENGTH_BYTES) * LENGTH_BYTES)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for name in order:
            _write(file, sources[name])


def _write(file: BinaryIO, source: Source) -> None:
    tensor = source.make()
    assert tuple(tensor.shape) == source.shape, f"{tensor.shape}, announced as {source.shape}"
    assert tensor.dtype == source.dtype, f"{tensor.dtype}, announced as {source.dtype}"
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(raw), PIECE_BYTES):
        file.write(raw[start : start + PIECE_BYTES].data)
    del raw, tensor
    source.release()


def write_text(path: Path, text: str) -> None:
    """Whole or not at all. Raises ConfigError."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when all of it is on the disk. Raises ConfigError."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space" if full else "make it writable"
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror}",
            field="out",
            hint=f"{fix} and give the same command again: what is done is kept",
        ) from error
