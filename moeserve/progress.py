"""A bar for loading, on the terminal's error stream; nothing where that is no terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class LoadingBar:
    """Called with (stage, fraction from 0 to 1) while a model loads; disappears at the end."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("loading", total=1.0)

    def __call__(self, stage: str, fraction: float) -> None:
        self._progress.update(self._task, description=stage or "loading", completed=fraction)

    def __enter__(self) -> LoadingBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
