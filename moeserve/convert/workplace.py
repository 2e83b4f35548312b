"""The output directory while a conversion is under way, and what an interrupted one left in it.

    OUT/model-00001-of-00007.safetensors   layers that are done, and the ends of the model
    OUT/.moeserve-convert/recipe.json      what makes the result what it is
    OUT/.moeserve-convert/state-3.safetensors   hidden states after three layers, their reports
    OUT/.moeserve-convert/tuning-40.safetensors   what is tuned after 40 steps, and how that went
    OUT/.moeserve-convert/tuned.json, model-…     tuned shards, all there once the former is

A state counts a layer as done, and is renamed into place after the layer's shard. The index is
written last, before the work directory goes; without it nothing takes OUT for a model.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moeserve.convert.shards import Source, whole_file, write_safetensors, write_text
from moeserve.core import ConfigError
from moeserve.models.checkpoint import INDEX_FILE

WORK = ".moeserve-convert"
RECIPE = "recipe.json"


@dataclass
class State:
    """How far a conversion has come. hidden: by name, what the next layer reads."""

    num_layers: int
    hidden: Mapping[str, Tensor]
    reports: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Saved:
    """One of a series of files, of which the last counts. notes: JSON values by name."""

    number: int
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]


class Workplace:
    """OUT and the work directory in it."""

    @staticmethod
    @contextmanager
    def open(out: Path, recipe: Mapping[str, Any]) -> Iterator[Workplace]:
        """Makes the directory, or finds one with the same recipe in it to go on with. Nobody else
        gets it until the end.

        Raises ConfigError for a directory that another conversion is writing, or with anything else
        in it, and where it cannot be made.
        """
        _make(out)
        with _only_user(out):
            yield Workplace(out, recipe)

    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        """out: a directory that nobody else uses."""
        self.out = out
        self._work = out / WORK
        text = json.dumps(recipe, indent=1, sort_keys=True)
        known = self._work / RECIPE
        if known.is_file():
            _check_same(out, json.loads(known.read_text(encoding="utf-8")), json.loads(text))
            return
        if set(out.iterdir()) - {self._work}:
            raise ConfigError(
                f"out: {out} exists and is not empty", field="out", hint="name a new directory"
            )
        _make(self._work)
        write_text(known, text)

    def load(self) -> State | None:
        """The last state, None where nothing is done."""
        saved = self.load_last("state")
        if saved is None:
            return None
        return State(saved.number, saved.tensors, saved.notes["reports"])

    def save(self, state: State) -> None:
        """Raises ConfigError where the disk is full; the state before is kept then."""
        notes = {"reports": state.reports}
        self.save_last("state", Saved(state.num_layers, state.hidden, notes))

    def load_last(self, kind: str) -> Saved | None:
        files = {
            int(path.stem.rpartition("-")[2]): path
            for path in self._work.glob(f"{kind}-*.safetensors")
        }
        if not files:
            return None
        number = max(files)
        with safe_open(files[number], framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = json.loads(file.metadata()["notes"])
        return Saved(number, tensors, notes)

    def save_last(self, kind: str, saved: Saved) -> None:
        """Instead of the one before. Raises ConfigError where the disk is full."""
        path = self._work / f"{kind}-{saved.number}.safetensors"
        sources = {name: Source.of(tensor) for name, tensor in saved.tensors.items()}
        write_safetensors(path, sources, {"notes": json.dumps(saved.notes)})
        for old in self._work.glob(f"{kind}-*.safetensors"):
            if old != path:
                old.unlink()

    def load_note(self, name: str) -> Any:
        """None where it was not written."""
        path = self._work / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save_note(self, name: str, note: Any) -> None:
        write_text(self._work / name, json.dumps(note, indent=1) + "\n")

    def shard(self, number: int, total: int) -> Path:
        """number: from 1."""
        return self.out / f"model-{number:05}-of-{total:05}.safetensors"

    def next_shard(self, number: int, total: int) -> Path:
        """Where a shard lies that is to take the place of another one."""
        return self._work / self.shard(number, total).name

    def take_next_shards(self) -> None:
        """Puts those that are there in their places."""
        for path in self._work.glob("model-*.safetensors"):
            path.replace(self.out / path.name)

    def copy(self, file: Path) -> None:
        with whole_file(self.out / file.name) as copy, file.open("rb") as source:
            shutil.copyfileobj(source, copy)

    def finish(self, weight_map: Mapping[str, str], num_bytes: int) -> None:
        """Writes the index: from now on OUT is a model."""
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(weight_map)}
        write_text(self.out / INDEX_FILE, json.dumps(index, indent=2) + "\n")
        shutil.rmtree(self._work)


def _make(directory: Path) -> None:
    """With what is above it; it may be there. Raises ConfigError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why, fix = f"cannot be made: {error.strerror}", "name a directory that you may write"
        if directory.is_symlink() and not directory.exists():
            why = f"is a link to {os.readlink(directory)}, which is not there"
            fix = "make that directory, or name a new one"
        elif isinstance(error, FileExistsError | NotADirectoryError):
            why, fix = "is, or is below, a file and not a directory", "name a new directory"
        raise ConfigError(f"out: {directory} {why}", field="out", hint=fix) from error


@contextmanager
def _only_user(directory: Path) -> Iterator[None]:
    """Holds the system's lock on a directory, which ends with the process, however that ends.

    On the directory itself, because a file of its own would have to go at the end, while somebody
    else may hold it open already. Raises ConfigError where another one has it.
    """
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"out: {directory} cannot be opened: {error.strerror}",
            field="out",
            hint="name a directory that you may write",
        ) from error
    try:
        _lock(handle, directory)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"out: another conversion is writing {directory}",
            field="out",
            hint="wait for it to end, or name another directory",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"out: {directory} cannot be locked: {error.strerror}",
            field="out",
            hint="name a directory on a file system with locks (flock), and copy it afterwards",
        ) from error


def _check_same(out: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if known == wanted:
        return
    names = sorted(name for name in {*known, *wanted} if known.get(name) != wanted.get(name))
    changes = ", ".join(f"{n} was {known.get(n)!r:.60}, is {wanted.get(n)!r:.60}" for n in names)
    raise ConfigError(
        f"out: {out} holds an unfinished conversion of another kind: {changes}",
        field="out",
        hint="repeat that command to finish it, name a new directory, or delete this one",
    )
