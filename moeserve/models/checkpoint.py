"""A checkpoint directory in Hugging Face's layout: which files, which tensor in which file.

    config.json, generation_config.json
    model.safetensors                       or
    model.safetensors.index.json and the shards that it names

Everything here is input from outside: nothing is executed, no pickle is read, and each refusal
says what was expected, what was found and what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeserve.core import ModelError
from moeserve.models.safetensors_file import FETCH_AGAIN, SafetensorsFile, TensorEntry

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_JSON_BYTES = 64 * 1024 * 1024  # the index of a 256-expert model has about 10 MB
NAMES_IN_ERROR = 10
SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")  # a plain name: no way out of the directory

CONVERT_PICKLE = (
    "loading a pickle runs code from the file; where you trust it, convert it once: "
    "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) with transformers"
)


def list_names(names: Iterable[str]) -> str:
    """The first names and how many there are, for an error message."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:NAMES_IN_ERROR])
    more = len(ordered) - NAMES_IN_ERROR
    return f"{len(ordered)} ({shown}{f', and {more} more' if more > 0 else ''})"


def describe(problems: Mapping[str, Collection[str]]) -> str:
    """Every kind of problem with the names it concerns, for an error message."""
    return "; ".join(f"{kind}: {list_names(names)}" for kind, names in problems.items() if names)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError that names the file and the place."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: expected at most {MAX_JSON_BYTES} bytes, found {size}")
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}", hint=FETCH_AGAIN) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{path}: expected a JSON object, found {type(value).__name__}", hint=FETCH_AGAIN
        )
    return value


def read_model_config(path: Path, families: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """config.json of a checkpoint directory, or by itself, and notes about what in it is not used.

    families: the values of `model_type` that moeserve implements. A config that names Python code
    of its own (`auto_map`) is refused unless its family is one of them; then that code is not
    needed, is never run, and a note says so. Raises ModelError.
    """
    file = path if path.is_file() else path / "config.json"
    config = read_json(file)
    known = sorted(families)
    model_type = config.get("model_type")
    auto_map = config.get("auto_map")
    if model_type not in known:
        code = f"; its auto_map asks to run Python code of the checkpoint ({auto_map})"
        raise ModelError(
            f"{file}: model_type: {model_type!r} is not one of {', '.join(known)}"
            + (f"{code}, which moeserve never does (no trust_remote_code)" if auto_map else ""),
            field="model_type",
        )
    notes = {}
    if auto_map:
        notes["auto_map"] = f"ignored: {model_type} is implemented here, no remote code is run"
    return config, notes


def read_generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json of a checkpoint directory; {} where it has none."""
    file = path / "generation_config.json"
    return read_json(file) if file.exists() else {}


class Checkpoint:
    """The tensors of a checkpoint directory by name, mapped from its files."""

    def __init__(self, path: Path, files: Sequence[SafetensorsFile]) -> None:
        self.path = path
        self._files = tuple(files)
        self._file_of = {name: file for file in self._files for name in file.entries}

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Reads and checks the index and the headers of all files; no weights.

        Raises ModelError for a directory without safetensors, a broken file, or an index that does
        not say what the files hold.
        """
        index = _find_index(path)
        if index is None:
            return cls(path, (SafetensorsFile(path / SINGLE_FILE),))
        location = _read_weight_map(index)
        files = [SafetensorsFile(path / shard) for shard in sorted(set(location.values()))]
        _check_index(index, location, files)
        return cls(path, files)

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def num_bytes(self, name: str) -> int:
        return self._entry(name).num_bytes

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[name].path

    def position(self, name: str) -> tuple[str, int]:
        """Sort key that puts tensors in the order in which they lie on disk."""
        return self._file_of[name].path.name, self._entry(name).start

    def read(self, name: str) -> Tensor:
        """A view of the mapped file: costs no memory before it is used. Do not write into it."""
        return self._file_of[name].read(name)

    def check_unchanged(self) -> None:
        """Raises ModelError if one of the files was written to since it was opened."""
        for file in self._files:
            file.file.check_unchanged()

    def release(self, name: str) -> None:
        """Gives the mapped pages of a tensor back to the system."""
        self._file_of[name].release(name)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _entry(self, name: str) -> TensorEntry:
        return self._file_of[name].entries[name]


def _find_index(path: Path) -> Path | None:
    """The index of a sharded checkpoint, None for a single file. Raises ModelError for neither."""
    if path.is_file():
        raise ModelError(f"{path}: a file", hint=f"name the directory that holds it: {path.parent}")
    if not path.is_dir():
        raise ModelError(f"{path}: no such file or directory")
    index, single = path / INDEX_FILE, path / SINGLE_FILE
    if not index.exists():
        if not single.exists():
            raise _no_weights(path)
        return None
    if single.exists() and SINGLE_FILE not in _read_weight_map(index).values():
        raise ModelError(
            f"{path}: holds {SINGLE_FILE} and {INDEX_FILE}, which does not name it",
            hint="delete the one that is out of date",
        )
    return index


def _no_weights(path: Path) -> ModelError:
    """What a directory without safetensors holds instead, and what to do about it."""
    names = sorted(entry.name for entry in path.iterdir())
    expected = f"expected {SINGLE_FILE} or {INDEX_FILE}"
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if "adapter_model.safetensors" in safetensors:
        return ModelError(f"{path}: {expected}, found an adapter", hint="merge it into its model")
    if safetensors:
        hint = f"shards need their {INDEX_FILE}; a single file must be named {SINGLE_FILE}"
        return ModelError(f"{path}: {expected}, found {list_names(safetensors)}", hint=hint)
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return ModelError(
            f"{path}: {expected}, found pickle checkpoints: {list_names(pickles)}",
            hint=CONVERT_PICKLE,
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return ModelError(
            f"{path}: {expected}, found GGUF files: {list_names(gguf)}",
            hint="GGUF is not supported; use the safetensors checkpoint it was made from",
        )
    found = list_names(names) if names else "an empty directory"
    return ModelError(
        f"{path}: {expected}, found {found}", hint="name the directory that holds the model"
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, as the index says; all shards are there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map: expected an object of file names", hint=FETCH_AGAIN)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise ModelError(
                f"{index}: tensor {name!r:.80}: expected the plain name of a .safetensors file, "
                f"found {shard!r:.80}"
            )
    absent = {shard for shard in weight_map.values() if not (index.parent / shard).is_file()}
    if absent:
        raise ModelError(
            f"{index}: shards that are not there: {list_names(absent)}",
            hint="the checkpoint is incomplete; fetch it again",
        )
    return weight_map


def _check_index(index: Path, location: dict[str, str], files: Sequence[SafetensorsFile]) -> None:
    """The index and the shards say the same: every tensor once, and where it is."""
    holders: dict[str, list[str]] = {}
    for file in files:
        for name in file.entries:
            holders.setdefault(name, []).append(file.path.name)
    twice = [f"{name} in {' and '.join(held)}" for name, held in holders.items() if len(held) > 1]
    unnamed = [f"{name} in {held[0]}" for name, held in holders.items() if name not in location]
    wrong = [
        f"{name} expected in {shard}, found in {' and '.join(holders.get(name, ['none']))}"
        for name, shard in location.items()
        if shard not in holders.get(name, ())
    ]
    problems = {
        "tensors that are not where it says": wrong,
        "tensors that two shards hold": twice,
        "tensors in its shards that it does not name": unnamed,
    }
    if any(problems.values()):
        raise ModelError(
            f"{index}: the index and the shards disagree: {describe(problems)}",
            hint="the files do not belong together; fetch the checkpoint again",
        )
