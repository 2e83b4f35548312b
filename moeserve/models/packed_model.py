"""A packed model directory: weights in the native kernels' form, which are mapped and not read.

    config.json, tokenizer and template files    copies of the model's own
    packed-00001-of-00002.safetensors            weights, one uint8 tensor per packed matrix or
                                                 layer of experts, the others as they are
    moeserve_pack.json                           what is in them; written last

Packed tensors start on whole pages, so that the kernels read the mapped file itself: a start costs
no copy, and processes share the page cache. safetensors allows no gap between tensors; the header
is padded to a page, packed tensors to whole pages, and plain tensors come last.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from torch import Tensor

from moeserve import __version__
from moeserve.cache.tiers.disk_store import DiskRecord
from moeserve.core import ModelError
from moeserve.cpu_backend.machine import huge_page_mode
from moeserve.cpu_backend.packing import LAYOUT_VERSION, FormatName, PackFormat
from moeserve.models.safetensors_file import MappedFile, SafetensorsFile
from moeserve.models.stores import Store, store_of
from moeserve.models.weight_map import Use, WeightRule
from moeserve.worker_messages import WorkerIdentity

MANIFEST = "moeserve_pack.json"
FORMAT = "moeserve packed model"
VERSION = 1
PAGE_BYTES = 4096
MAX_MANIFEST_BYTES = 64 * 1024 * 1024
REPACK = "pack the model again with `moeserve pack`"
#: it had a bf16 scale for each group of int4 without zero points; all else was as it is now
LAYOUT_WITHOUT_FACTORS = 1


class FormEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A PackFormat."""

    name: FormatName
    group: Annotated[int, msgspec.Meta(ge=0, le=128)] = 0
    zero_points: bool = False
    weight_only: bool = False

    @classmethod
    def of(cls, form: PackFormat) -> FormEntry:
        return cls(form.name, form.group, form.zero_points, form.weight_only)

    def form(self, weight_only: bool | None) -> PackFormat:
        """weight_only: None for what is written here; it changes products, not what is stored."""
        chosen = self.weight_only if weight_only is None else weight_only
        return PackFormat(self.name, self.group, self.zero_points, chosen)


class WeightEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stored tensor. forms: none of a plain one, one of a matrix, those of gate and up and of
    down of experts. checksums: of experts, xxh3_64 of each record."""

    file: str
    shape: tuple[int, ...]
    forms: tuple[FormEntry, ...] = ()
    checksums: tuple[int, ...] = ()


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """moeserve_pack.json. layout: LAYOUT_VERSION of the packed bytes. model: what was packed.
    files: their sizes in bytes. dtype: the compute dtype, also that of plain tensors."""

    format: str
    version: int
    layout: int
    model: str
    config_sha256: str
    dtype: Annotated[str, msgspec.Meta(pattern="^(float32|bfloat16)$")]
    files: dict[str, int]
    weights: dict[str, WeightEntry]


class _Head(msgspec.Struct):
    """What every version of the manifest has."""

    format: str = ""
    version: int = 0
    layout: int = 0


def stored_shape(store: Store) -> tuple[int, ...]:
    """Packed matrices [bytes] are padded to whole pages; records of experts are that already."""
    if len(store.forms) == 1:
        return (-(-store.shape[0] // PAGE_BYTES) * PAGE_BYTES,)
    return store.shape


def config_sha256(path: Path) -> str:
    return hashlib.sha256((path / "config.json").read_bytes()).hexdigest()


def is_packed(path: Path) -> bool:
    return (path / MANIFEST).exists()


def read_manifest(path: Path) -> Manifest:
    """The checked manifest of a packed directory. Raises ModelError.

    One of an older layout is taken where its formats are as they were.
    """
    file = path / MANIFEST
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_MANIFEST_BYTES + 1)
        head = msgspec.json.decode(content, type=_Head)
        known_layout = head.layout in (LAYOUT_WITHOUT_FACTORS, LAYOUT_VERSION)
        if head.format != FORMAT or head.version != VERSION or not known_layout:
            raise ModelError(
                f"{file}: expected {FORMAT!r}, version {VERSION}, layout {LAYOUT_VERSION}; found "
                f"{head.format!r:.80}, version {head.version}, layout {head.layout}",
                hint=REPACK,
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ModelError(f"{file}: {error}", hint=REPACK) from error
    if manifest.layout == LAYOUT_WITHOUT_FACTORS:
        _check_without_factors(manifest, file)
    if manifest.config_sha256 != config_sha256(path):
        raise ModelError(
            f"{path / 'config.json'}: not the one that the weights beside it were packed for",
            hint=REPACK,
        )
    return manifest


def _check_without_factors(manifest: Manifest, file: Path) -> None:
    """Raises ModelError where a weight's format is not what it was."""
    for name, entry in manifest.weights.items():
        if any(form.name == "int4" and not form.zero_points for form in entry.forms):
            raise ModelError(
                f"{file}: {name} is int4 as of layout {manifest.layout}; that of layout "
                f"{LAYOUT_VERSION} is another",
                hint=REPACK,
            )


def mapped_advice() -> int:
    """How a mapping that the kernels read is to be filled from the disk: in huge pages, where the
    system has them. 4 KiB pages cost a tenth of the speed of decoding (docs/log.md)."""
    return mmap.MADV_WILLNEED if huge_page_mode() in (None, "never") else mmap.MADV_HUGEPAGE


class PackedModel:
    """The weights of a packed directory, as memory for `PackedTargets`.

    Opening reads and checks the manifest and the headers, no weights. Raises ModelError for a
    directory of another version, one whose files were cut short, changed or swapped, and a
    config.json that is not the one that was packed.
    """

    is_filled = True

    def __init__(self, path: Path, advice: int = mmap.MADV_WILLNEED) -> None:
        """advice: how the mapped weights will be used, as madvise(2) has it."""
        self.path = path
        self.manifest = read_manifest(path)
        self._advice = advice
        self._files: dict[str, SafetensorsFile] = {}
        for name, num_bytes in self.manifest.files.items():
            self._files[name] = self._open_file(name, num_bytes)

    def reserve(self, stores: Sequence[Store]) -> dict[str, Tensor]:
        """Raises ModelError unless exactly these weights are here, in these forms."""
        weights = self.manifest.weights
        wanted = {store.name for store in stores}
        if wanted != weights.keys():
            differ = ", ".join(sorted(wanted ^ weights.keys())[:5])
            raise self._broken(f"its weights are not those of config.json: {differ}")
        return {store.name: self._mapped(store, weights[store.name]) for store in stores}

    def on_disk(self, name: str) -> list[DiskRecord]:
        """Where the records of a layer's experts lie. Raises ModelError without checksums."""
        entry = self.manifest.weights[name]
        num_experts, record_bytes = entry.shape
        if len(entry.checksums) != num_experts:
            raise self._broken(
                f"{name}: {len(entry.checksums)} checksums for {num_experts} experts, which are"
                " read from disk again and again"
            )
        file = self._files.get(entry.file)
        if file is None or name not in file.entries:
            raise self._broken(f"{name} is not in {entry.file!r:.80}")
        start = file.entries[name].start
        path = self.path / entry.file
        return [
            DiskRecord(path, start + record_bytes * expert, record_bytes, entry.checksums[expert])
            for expert in range(num_experts)
        ]

    @property
    def mapped(self) -> tuple[MappedFile, ...]:
        """What the weights that were reserved lie in."""
        found = (file.mapped for file in self._files.values())
        return tuple(mapped for mapped in found if mapped is not None)

    def release(self, name: str) -> None:
        """Unmaps the pages of a weight until it is read again: while they are mapped they count as
        memory of this process, and the system does not forget them."""
        self._files[self.manifest.weights[name].file].release(name)

    def leave_page_cache(self) -> None:
        """Asks the system to forget what it holds of the files."""
        for file in self._files.values():
            file.leave_page_cache()

    def close(self) -> None:
        """The mapping lives as long as a weight in it."""
        for file in self._files.values():
            file.close()

    def _open_file(self, name: str, num_bytes: int) -> SafetensorsFile:
        if Path(name).name != name:
            raise self._broken(f"{name!r:.80} is no plain name of a file")
        path = self.path / name
        if not path.is_file():
            raise self._broken(f"{name} is not there")
        found = path.stat().st_size
        if found != num_bytes:
            raise self._broken(f"{name}: expected {num_bytes} bytes, found {found}")
        return SafetensorsFile(path, self._advice)

    def _mapped(self, store: Store, entry: WeightEntry) -> Tensor:
        file = self._files.get(entry.file)
        found = None if file is None else file.entries.get(store.name)
        if file is None or found is None:
            raise self._broken(f"{store.name} is not in {entry.file!r:.80}")
        expected = (store.dtype, stored_shape(store))
        if (found.dtype, found.shape) != expected or found.shape != entry.shape:
            raise self._broken(
                f"{store.name}: expected {expected[0]} {list(expected[1])}, "
                f"found {found.dtype} {list(found.shape)}"
            )
        if store.forms and found.start % PAGE_BYTES:
            raise self._broken(f"{store.name}: starts at byte {found.start}, within a page")
        tensor = file.read(store.name)
        return tensor[: store.shape[0]] if len(store.forms) == 1 else tensor

    def _broken(self, problem: str) -> ModelError:
        return ModelError(f"{self.path / MANIFEST}: {problem}", hint=REPACK)


class PackedForms:
    """The form of each rule's target, as a packed directory says."""

    def __init__(self, packed: PackedModel, weight_only: bool | None) -> None:
        """weight_only: None for what it was packed for; products change by it, not the bytes."""
        self._packed = packed
        self._weight_only = weight_only

    def __call__(self, rule: WeightRule) -> PackFormat:
        """Raises ModelError where the directory has no such weight, or not in such a form."""
        name = store_of(rule)
        entry = self._packed.manifest.weights.get(name)
        forms = () if entry is None else entry.forms
        if len(forms) != (1 if name == rule.target else 2):
            raise ModelError(
                f"{self._packed.path / MANIFEST}: {name}: {len(forms)} forms", hint=REPACK
            )
        return forms[1 if rule.use is Use.DOWN else 0].form(self._weight_only)


def worker_identity(packed: PackedModel, integers: bool | None, isa: str) -> WorkerIdentity:
    """integers: of ModelConfig.quantize_activations. isa: the level that computes."""
    manifest = packed.manifest
    content = (packed.path / MANIFEST).read_bytes()
    return WorkerIdentity(
        version=__version__,
        config_sha256=manifest.config_sha256,
        manifest_sha256=hashlib.sha256(content).hexdigest(),
        layout=manifest.layout,
        isa=isa,
        integers=integers,
    )
