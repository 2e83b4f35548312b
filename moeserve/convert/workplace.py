"""The output directory while a conversion is under way, and what an interrupted one left in it.

    OUT/model-00001-of-00007.safetensors   layers that are done, and the ends of the model
    OUT/.moeserve-convert/recipe.json      what makes the result what it is
    OUT/.moeserve-convert/state-3.safetensors   hidden states after three layers, their reports

A state counts a layer as done, and is renamed into place after the layer's shard. The index is
written last, before the work directory goes; without it nothing takes OUT for a model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
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
    hidden: dict[str, Tensor]
    reports: list[dict[str, float]] = field(default_factory=list)


class Workplace:
    """OUT and the work directory in it."""

    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        """Makes the directory, or finds one with the same recipe in it to go on with.

        Raises ConfigError for a directory with anything else in it, and where it cannot be made.
        """
        self.out = out
        self._work = out / WORK
        text = json.dumps(recipe, indent=1, sort_keys=True)
        known = self._work / RECIPE
        if known.is_file():
            _check_same(out, json.loads(known.read_text(encoding="utf-8")), json.loads(text))
            return
        if out.exists() and (not out.is_dir() or set(out.iterdir()) - {self._work}):
            raise ConfigError(
                f"out: {out} exists and is not empty", field="out", hint="name a new directory"
            )
        try:
            self._work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"out: {out} cannot be made: {error.strerror}", field="out"
            ) from error
        write_text(known, text)

    def load(self) -> State | None:
        """The last state, None where nothing is done."""
        states = {int(p.stem.partition("-")[2]): p for p in self._work.glob("state-*.safetensors")}
        if not states:
            return None
        number = max(states)
        with safe_open(states[number], framework="pt") as file:
            hidden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            reports = json.loads(file.metadata()["reports"])
        return State(number, hidden, reports)

    def save(self, state: State) -> None:
        """Raises ConfigError where the disk is full; the state before is kept then."""
        path = self._work / f"state-{state.num_layers}.safetensors"
        sources = {name: Source.of(tensor) for name, tensor in state.hidden.items()}
        write_safetensors(path, sources, {"reports": json.dumps(state.reports)})
        for old in self._work.glob("state-*.safetensors"):
            if old != path:
                old.unlink()

    def shard(self, number: int, total: int) -> Path:
        """number: from 1."""
        return self.out / f"model-{number:05}-of-{total:05}.safetensors"

    def copy(self, file: Path) -> None:
        with whole_file(self.out / file.name) as copy, file.open("rb") as source:
            shutil.copyfileobj(source, copy)

    def finish(self, weight_map: Mapping[str, str], num_bytes: int) -> None:
        """Writes the index: from now on OUT is a model."""
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(weight_map)}
        write_text(self.out / INDEX_FILE, json.dumps(index, indent=2) + "\n")
        shutil.rmtree(self._work)


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
