"""This machine as it was before and after the cases of each model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from moeserve.experts.schedule.profile import Profile
from moeserve.planner.lookup import find_hardware


class Calibrations:
    """Profiles in a folder, two for each model; the second of one is the first of the next."""

    def __init__(self, folder: Path, again: bool) -> None:
        """again: do without those that there are."""
        self._folder = folder
        self._again = again
        self._latest: Path | None = None

    def before(self, model: str, is_measured: Callable[[Profile], bool]) -> Profile:
        """is_measured: whether nothing is to be measured under that profile any more."""
        path, after = self._path(model, "before"), self._path(model, "after")
        if not self._again and path.exists() and after.exists():
            kept = find_hardware(str(path), False)
            if is_measured(kept):
                self._latest = None
                return kept
        after.unlink(missing_ok=True)
        if self._latest is None:
            return self._calibrate(path)
        shutil.copy(self._latest, path)
        return find_hardware(str(path), False)

    def after(self, model: str) -> Profile:
        path = self._path(model, "after")
        if path.exists():
            return find_hardware(str(path), False)
        self._latest = path
        return self._calibrate(path)

    def _path(self, model: str, when: str) -> Path:
        return self._folder / f"{model}-{when}.profile.json"

    @staticmethod
    def _calibrate(path: Path) -> Profile:
        command = [sys.executable, "-m", "moeserve.cli", "calibrate", "-o", str(path)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return find_hardware(str(path), False)
