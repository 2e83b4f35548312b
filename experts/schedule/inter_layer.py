"""Between layers: what to bring into the fast tier before it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod

from moeserve.core import Placement
from moeserve.predictors.base import Prediction


class InterLayerScheduler(ABC):
    """Turns predictions into prefetches."""

    @abstractmethod
    def prefetch(self, prediction: Prediction, protect: Placement) -> None:
        """Starts what pays. Never evicts what `protect`, the running layer, needs, and never delays
        a demand fetch (DESIGN, invariant 2)."""


class ResidentPrefetch(InterLayerScheduler):
    """Everything is in the fast tier already: there is nothing to bring."""

    def prefetch(self, prediction: Prediction, protect: Placement) -> None:
        """Nothing is absent, so no prediction can name anything to move."""
