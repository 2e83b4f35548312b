"""What a policy is: it knows how much each expert is worth and picks victims. It moves no bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from moeserve.core import ExpertKey


class Policy(ABC):
    """Told of every use, arrival and eviction in one tier; asked for victims.

    Methods are called on the engine's thread, in the order in which things happen.
    """

    name: str

    @abstractmethod
    def used(self, layer: int, experts: Iterable[int]) -> None:
        """A step runs these experts of the layer, wherever they are read from."""

    @abstractmethod
    def loaded(self, key: ExpertKey) -> None:
        """The expert has arrived and may be read."""

    @abstractmethod
    def evicted(self, key: ExpertKey) -> None:
        """The expert has lost its slot."""

    @abstractmethod
    def victims(self, candidates: Sequence[ExpertKey], count: int) -> list[ExpertKey]:
        """Up to `count` of the candidates, the least worth first. No candidate is in use.

        Fewer than `count` means: what is wanted instead is worth less than what is there.
        """
