"""This machine as it was before the rounds of each model's cases, between some, and after them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from moeserve.experts.schedule.profile import Profile
from moeserve.planner.lookup import find_hardware

#: what a model has in each format beside what every engine needs (`calibrate --formats`)
MEASURED = {"none": "bfloat16", "int8": "int8", "int4": "int4/32"}
#: rounds from one calibration to the next: each takes as long as a round of four cases
ROUNDS_BETWEEN = 2


class Calibrations:
    """Profiles in a folder, by model and number: 0 before its first round, n after its n-th, where
    one is due then."""

    def __init__(self, folder: Path, again: bool, rounds: int) -> None:
        """again: do without those that there are."""
        self._folder = folder
        self._again = again
        self._numbers = sorted({*range(0, rounds, ROUNDS_BETWEEN), rounds})
        self._latest: Path | None = None  # of the model before, when its last round had ended

    def first(self, model: str, is_measured: Callable[[Profile], bool]) -> Profile:
        """is_measured: whether nothing is to be measured under that profile any more. Else what
        there is of that model is forgotten."""
        paths = [self._path(model, number) for number in self._numbers]
        if not self._again and all(path.exists() for path in paths):
            kept = find_hardware(str(paths[0]), False)
            if is_measured(kept):
                self._latest = None
                return kept
        for path in paths:
            path.unlink(missing_ok=True)
        if self._latest is None or form_of(model) not in forms_in(self._latest):
            return self._calibrate(model, paths[0])
        shutil.copy(self._latest, paths[0])
        return find_hardware(str(paths[0]), False)

    def is_due(self, number: int) -> bool:
        """After so many rounds."""
        return number in self._numbers

    def after(self, model: str, number: int) -> Profile:
        """As it was after that round, which has just ended if there is no such profile."""
        assert self.is_due(number), f"nothing is calibrated after round {number}"
        path = self._path(model, number)
        if path.exists():
            return find_hardware(str(path), False)
        self._latest = path
        return self._calibrate(model, path)

    def _path(self, model: str, number: int) -> Path:
        return self._folder / f"{model}-{number}.profile.json"

    @staticmethod
    def _calibrate(model: str, path: Path) -> Profile:
        command = [sys.executable, "-m", "moeserve.cli", "calibrate", "-o", str(path)]
        command += ["--formats", form_of(model)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return find_hardware(str(path), False)


def form_of(model: str) -> str:
    """As `calibrate` names it. model: `Case.model`."""
    return MEASURED[model.rpartition("-")[2]]


def forms_in(path: Path) -> set[str]:
    """Of the experts that a profile has seen."""
    return {curve.weights for curve in find_hardware(str(path), False).cpu.expert_curves}
