"""Which row of a step goes on from which row of the step before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


class RowLinks:
    """Rows whose token before is known: it was a row of the last step."""

    def __init__(self) -> None:
        self._told: Rows | None = None
        self.num_rows = 0  # of the running step
        self.rows: Rows = np.zeros(0, np.int64)  # of the running step, rising
        self.before: Rows = np.zeros(0, np.int64)  # of the step before, one for each of `rows`

    def tell(self, previous_rows: Rows) -> None:
        """As `Predictor.begin_step`. Where no `turn` came since the last time, the step between was
        not seen, and nothing is known of rows that go on from it."""
        told = np.asarray(previous_rows, np.int64)
        self._told = told if self._told is None else np.full_like(told, -1)

    def turn(self, num_rows: int) -> None:
        """A step of that many rows begins. What was told is taken if it can be meant for it."""
        num_done, self.num_rows = self.num_rows, num_rows
        told, self._told = self._told, None
        if told is None or len(told) != num_rows or told.max(initial=-1) >= num_done:
            told = np.arange(num_rows) if num_done == num_rows else np.full(num_rows, -1)
        self.rows = np.flatnonzero(told >= 0)
        self.before = told[self.rows]
