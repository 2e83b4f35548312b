"""Which steps a predictor learns from that nobody asks about."""

from __future__ import annotations

import sys

#: of so many steps it looks on in the first two: what a token chooses follows from the one before.
#: A quarter of what predicting costs, and tries are further apart than it takes to learn
LOOK_EVERY = 8


class LookingOn:
    """Counts steps by their layers, which come in rising order."""

    def __init__(self) -> None:
        self._step, self._layer = -1, sys.maxsize

    def looks(self, layer: int) -> bool:
        """Whether to look on; to be asked for every layer that `Predictor.look_on` is told of."""
        self._step += layer <= self._layer
        self._layer = layer
        return self._step % LOOK_EVERY < 2
