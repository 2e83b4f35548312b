"""One safetensors file: its header, checked as hostile input, and its tensors, mapped on demand.

Own parser instead of the safetensors package, for two reasons: every refusal names the file, the
tensor, what was expected and what was found; and the mapping can give pages back while the file is
read, so that a load needs no more memory than the model (mapped pages count as resident).
Format: https://huggingface.co/docs/safetensors#format. It is an 8-byte little-endian header
length, a JSON header, then the tensors without a gap.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import ModelError
from moeserve.models.open_file import OpenFile

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
MAX_DIMS = 64
FETCH_AGAIN = "the file is damaged or incomplete; fetch it again"
LFS_POINTER = b"version https://git-lfs"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

# Python names the flag from 3.13 on. Without it Linux counts a private mapping as memory to be
# reserved and refuses one larger than RAM, although no page of it is ever written.
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, stop) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class MappedFile:
    """A file and the whole of it in memory, for as long as anybody refers to this."""

    file: OpenFile
    memory: NDArray[np.uint8]


class SafetensorsFile:
    """The tensors of one file. Opening reads and checks the header only.

    Raises ModelError for every file that is not whole and consistent.
    file: to be asked whether it is still the same before mapped tensors are used.
    """

    def __init__(self, path: Path, advice: int = mmap.MADV_SEQUENTIAL) -> None:
        """advice: how the mapping will be used, as madvise(2) has it."""
        self.path = path
        self._advice = advice
        self.file = OpenFile(path)
        self.entries = read_header(self.file)
        self._mapping: mmap.mmap | None = None
        self._bytes: Tensor | None = None

    def read(self, name: str) -> Tensor:
        """The tensor, mapped: no byte is read before it is used. Treat it as read-only.

        Raises ModelError for a file that was changed since it was opened.
        """
        self.file.check_unchanged()
        entry = self.entries[name]
        raw = self._map()[entry.start : entry.stop]
        if entry.start % entry.dtype.itemsize:
            raw = raw.clone()  # torch cannot view memory that is not aligned for the type
        return raw.view(entry.dtype).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Gives the pages of a tensor back; reading it again maps them again."""
        entry = self.entries[name]
        if self._mapping is not None and entry.num_bytes:
            start = entry.start - entry.start % mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, start, entry.stop - start)

    def leave_page_cache(self) -> None:
        """Asks the system to forget the file's pages, as far as no mapping uses them."""
        os.posix_fadvise(self.file.handle, 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def mapped(self) -> MappedFile | None:
        """None: nothing was read yet, or the mapping was dropped."""
        if self._mapping is None:
            return None
        return MappedFile(self.file, np.frombuffer(self._mapping, dtype=np.uint8))

    def close(self) -> None:
        """Drops the mapping; tensors that are still held keep it alive."""
        self._mapping = self._bytes = None

    def _map(self) -> Tensor:
        if self._bytes is None:
            # Private and writable, because torch has no read-only tensors: a stray write would
            # stay in this process instead of reaching the checkpoint or ending us with SIGSEGV.
            try:
                mapping = mmap.mmap(
                    self.file.handle,
                    0,
                    flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            except OSError as error:
                raise ModelError(
                    f"{self.path}: cannot be mapped: {error.strerror}",
                    hint="raise the limit of address space (ulimit -v), or free memory",
                ) from error
            mapping.madvise(self._advice)
            self._mapping, self._bytes = mapping, torch.frombuffer(mapping, dtype=torch.uint8)
        return self._bytes


def read_header(file: OpenFile) -> dict[str, TensorEntry]:
    """The checked header of a safetensors file. Raises ModelError."""
    path, size = file.path, file.num_bytes
    head = file.read(0, len(LFS_POINTER))
    _check_length(path, head, size)
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    text = file.read(LENGTH_BYTES, length)
    header = _parse(path, text)
    data_start = LENGTH_BYTES + length
    entries = {name: _entry(path, name, value, data_start, size) for name, value in header.items()}
    _check_layout(path, entries, data_start, size)
    return entries


def _broken(path: Path, problem: str) -> ModelError:
    return ModelError(f"{path}: {problem}", hint=FETCH_AGAIN)


def _check_length(path: Path, head: bytes, size: int) -> None:
    if head == LFS_POINTER:
        raise ModelError(
            f"{path}: a Git LFS pointer, not the weights",
            hint="run `git lfs pull` beside it",
        )
    if size < LENGTH_BYTES:
        raise _broken(path, f"{size} bytes; a safetensors file starts with {LENGTH_BYTES} bytes")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise _broken(
            path, f"header length: expected at most {MAX_HEADER_BYTES} bytes, found {length}"
        )
    if LENGTH_BYTES + length > size:
        raise _broken(path, f"header of {length} bytes expected, found {size - LENGTH_BYTES} bytes")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """Tensor name -> its raw header entry, without `__metadata__`."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise _broken(path, f"header names {twice!r} twice")
        return found

    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=no_duplicates,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, f"header: expected a JSON object, found {type(header).__name__}")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _broken(path, "__metadata__: expected an object of strings")
    return header


def _finite(text: str) -> float:
    """A number in JSON. Python would also take NaN and Infinity, which JSON has not."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a JSON number")
    return number


def _entry(path: Path, name: str, value: Any, data_start: int, size: int) -> TensorEntry:
    where = f"tensor {name!r}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _broken(path, f"{where}: expected dtype, shape and data_offsets, found {value!r:.80}")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        known = ", ".join(DTYPES)
        raise ModelError(f"{path}: {where}: dtype {value['dtype']!r:.80} is not one of {known}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise _broken(path, f"{where}: shape: expected sizes of 0 or more, found {shape!r:.80}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"{where}: data_offsets: expected [start, stop], found {offsets!r:.80}")
    # An empty tensor may name sizes whose product overflows the 64 bits torch counts in.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise _broken(path, f"{where}: shape {shape!r:.80} is larger than any memory")
    expected, found = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if expected != found:
        kind = f"{value['dtype']} {shape}"
        raise _broken(path, f"{where}: {kind} takes {expected} bytes, data_offsets give {found}")
    start, stop = data_start + offsets[0], data_start + offsets[1]
    if stop > size:
        raise _broken(path, f"{where}: ends at byte {stop}, the file has {size} bytes")
    return TensorEntry(dtype, tuple(shape), start, stop)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """Tensors follow each other without overlap or gap up to the end of the file."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            kind = "overlaps the one before" if entry.start < position else "leaves a gap before it"
            raise _broken(
                path,
                f"tensor {name!r}: {kind}: expected to start at byte {position}, "
                f"found {entry.start}",
            )
        position = entry.stop
    if position != size:
        raise _broken(path, f"tensors end at byte {position}, the file has {size} bytes")
