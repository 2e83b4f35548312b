"""`moeserve pack`: writes a packed model directory; see packed_model for what one is."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from moeserve.cache.tiers.disk_store import checksum
from moeserve.config import ModelConfig
from moeserve.core import ConfigError, ModelError
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import LAYOUT_VERSION
from moeserve.models import packed_model
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.packed_model import (
    FORMAT,
    MANIFEST,
    PAGE_BYTES,
    VERSION,
    FormEntry,
    Manifest,
    WeightEntry,
    config_sha256,
    stored_shape,
)
from moeserve.models.read_weights import choose_dtype, name_of, read_checkpoint
from moeserve.models.registry import find_model
from moeserve.models.safetensors_file import DTYPES, LENGTH_BYTES
from moeserve.models.stores import Store

MAX_SHARD_BYTES = 4 << 30
#: pages that were written are given back after so many bytes of the checkpoint
RELEASE_BYTES = 256 << 20
#: everything that belongs to a model besides its weights
COPIED = (
    "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "README*",
    "predictors.safetensors", "pregate.safetensors",
)  # fmt: skip
NOT_COPIED = ("model.safetensors.index.json", MANIFEST)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

CPU = torch.device("cpu")

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class PackReport:
    """What was written. notes: as of a loaded model."""

    path: Path
    num_bytes: int
    notes: dict[str, str]


def pack_model(
    config: ModelConfig, out: Path, num_threads: int | None = None, progress: Progress | None = None
) -> PackReport:
    """Packs a model as `config` says, and writes it to the directory `out`, whole or not at all.

    The packed bytes are computed straight into the mapped files: memory stays at a few pieces of
    the checkpoint. A directory that exists must be empty. Raises ModelError, ConfigError.
    """
    _check_out(out)
    found = find_model(config)
    if packed_model.is_packed(found.path):
        raise ModelError(f"{found.path}: packed already", hint="pack the checkpoint it came from")
    if config.device != "cpu":
        raise ConfigError(f"device: {config.device}: weights are packed on the CPU", field="device")
    runtime = NativeRuntime(num_threads)
    with _directory(out) as path:
        for file in _files_to_copy(found.path):
            shutil.copyfile(file, path / file.name)
        memory = PackWriter(path)
        with closing(Checkpoint.open(found.path)) as checkpoint:
            dtype, found.notes["dtype"] = choose_dtype(config.dtype, found.raw, checkpoint)
            read = read_checkpoint(
                checkpoint, found, config, dtype, CPU, runtime, memory, memory.watch(progress)
            )
        memory.close()
        memory.write_manifest(config.name, name_of(dtype))
    report = PackReport(out, sum(memory.files.values()), found.notes | read.notes)
    names = list(memory.files)
    del read, memory  # with their mappings
    for name in names:
        _leave_page_cache(out / name)
    return report


def _leave_page_cache(path: Path) -> None:
    """Has the system forget its 4 KiB pages of a file that was written: whoever reads the file gets
    larger ones, which the kernels read faster."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


class PackWriter:
    """Memory in the files of a packed directory."""

    is_filled = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, int] = {}
        self.weights: dict[str, WeightEntry] = {}
        self._mappings: list[mmap.mmap] = []
        self._records: dict[str, Tensor] = {}  # of experts, [E, bytes]

    def reserve(self, stores: Sequence[Store]) -> dict[str, Tensor]:
        """Makes the files, in their full size. Raises ModelError where the disk has no room."""
        shards = split(stores)
        rooms: dict[str, Tensor] = {}
        for number, shard in enumerate(shards, start=1):
            name = f"packed-{number:05}-of-{len(shards):05}.safetensors"
            header, offsets, num_bytes = layout_file(shard)
            mapping = self._make_file(name, header, num_bytes)
            whole = torch.frombuffer(mapping, dtype=torch.uint8)
            for store in shard:
                stop = offsets[store.name] + num_bytes_of(store.shape, store.dtype)
                raw = whole[offsets[store.name] : stop]
                rooms[store.name] = raw.view(store.dtype).view(store.shape)
                forms = tuple(FormEntry.of(form) for form in store.forms)
                self.weights[store.name] = WeightEntry(name, stored_shape(store), forms)
                if len(forms) == 2:
                    self._records[store.name] = rooms[store.name]
            self.files[name] = num_bytes
        return rooms

    def watch(self, progress: Progress | None) -> Progress:
        """progress, and now and then the pages that were written are given back."""
        last = 0.0

        def report(stage: str, fraction: float) -> None:
            nonlocal last
            step = RELEASE_BYTES / max(1, sum(self.files.values()))
            if not last <= fraction < last + step:
                last = fraction
                for mapping in self._mappings:
                    mapping.madvise(mmap.MADV_DONTNEED)  # shared: they stay in the page cache
            if progress is not None:
                progress("packing" if stage == "loading weights" else stage, fraction)

        return report

    def close(self) -> None:
        """Takes the checksums of experts, and brings everything to the disk."""
        for name, records in self._records.items():
            sums = tuple(checksum(record.numpy().data) for record in records)
            self.weights[name] = msgspec.structs.replace(self.weights[name], checksums=sums)
        self._records.clear()
        for mapping in self._mappings:
            mapping.flush()
        self._mappings.clear()

    def write_manifest(self, model: str, dtype: str) -> None:
        """Last of all, beside config.json: the directory is whole from then on."""
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            layout=LAYOUT_VERSION,
            model=model,
            config_sha256=config_sha256(self.path),
            dtype=dtype,
            files=self.files,
            weights=self.weights,
        )
        file = self.path / MANIFEST
        file.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        _sync(file)

    def _make_file(self, name: str, header: bytes, num_bytes: int) -> mmap.mmap:
        try:
            with (self.path / name).open("xb+") as file:
                # Room on the disk now: writing to a mapping that has none would be SIGBUS.
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                file.write(header)
                file.flush()
                mapping = mmap.mmap(file.fileno(), num_bytes)
        except OSError as error:
            raise ModelError(
                f"{self.path.parent}: no room for {name} of {num_bytes} bytes: {error.strerror}",
                hint="free that much, or name a directory on another disk",
            ) from error
        self._mappings.append(mapping)
        return mapping


def num_bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def split(stores: Sequence[Store]) -> list[list[Store]]:
    """Shards of at most MAX_SHARD_BYTES; a store that is larger has one for itself."""
    shards: list[list[Store]] = [[]]
    room = MAX_SHARD_BYTES
    for store in stores:
        num_bytes = num_bytes_of(stored_shape(store), store.dtype)
        if num_bytes > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(store)
        room -= num_bytes
    return shards


def layout_file(stores: Sequence[Store]) -> tuple[bytes, dict[str, int], int]:
    """The header of a safetensors file, where in it each tensor starts, and its size.

    Packed tensors first, which are whole pages; then the others, the widest numbers first, so that
    everything is aligned without a gap.
    """
    ordered = sorted(stores, key=lambda store: (not store.forms, -store.dtype.itemsize))
    header: dict[str, object] = {"__metadata__": {"format": FORMAT}}
    starts: dict[str, int] = {}
    position = 0
    for store in ordered:
        shape = stored_shape(store)
        stop = position + num_bytes_of(shape, store.dtype)
        header[store.name] = {
            "dtype": DTYPE_NAMES[store.dtype],
            "shape": shape,
            "data_offsets": [position, stop],
        }
        starts[store.name], position = position, stop
    text = json.dumps(header, separators=(",", ":")).encode()
    size = -(-(LENGTH_BYTES + len(text)) // PAGE_BYTES) * PAGE_BYTES
    text = text.ljust(size - LENGTH_BYTES)
    raw = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return raw, {name: size + start for name, start in starts.items()}, size + position


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: exists and is not empty", hint="name a new directory")
    if not out.parent.is_dir():
        raise ModelError(f"{out.parent}: no such directory", hint="make it first")


@contextmanager
def _directory(out: Path) -> Iterator[Path]:
    """A directory that becomes `out` if all goes well, and is deleted otherwise."""
    out = out.absolute()
    try:
        path = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            yield path
            path.chmod(0o755)
            _sync(path)
            os.rename(path, out)
            _sync(out.parent)
        finally:
            shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"{out}: cannot be written: {error.strerror}",
            hint="name a directory that you may write to, on a disk with room",
        ) from error


def _sync(path: Path) -> None:
    """Brings a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files_to_copy(path: Path) -> list[Path]:
    found = {file for pattern in COPIED for file in path.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name not in NOT_COPIED)
