"""What a policy is: it knows how much each expert is worth and picks victims. It moves no bytes.

Experts are told by their numbers (`ExpertNumbers`): a policy is arrays over all experts of a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.chores import PutOff, at_once
from moeserve.core import LayerUse


class Policy(ABC):
    """Told of every use, arrival and eviction in one tier; asked for victims.

    Methods are called on the engine's thread, in the order in which things happen: for a layer of a
    step first `observed`, then victims for what it lacks, then `used`.

    put_off: for what a policy learns from a use, if that takes time; what it is asked until then it
    answers by what it knew.
    """

    name: str
    put_off: PutOff = staticmethod(at_once)

    def observed(self, use: LayerUse) -> None:  # noqa: B027 - an answer to it is optional
        """A step asks this of a layer, over all rows of the batch. Most policies need no more."""

    def expected(  # noqa: B027 - as above
        self, layer: int, probabilities: NDArray[np.float32]
    ) -> None:
        """What a predictor says of the layer's next use: [E], P(any row wants the expert). It stays
        as it is until then."""

    @abstractmethod
    def used(self, layer: int, experts: Sequence[int]) -> None:
        """A step runs these experts of the layer, wherever they are read from."""

    @abstractmethod
    def loaded(self, number: int) -> None:
        """The expert has arrived and may be read."""

    @abstractmethod
    def evicted(self, number: int) -> None:
        """The expert has lost its slot."""

    def by_preference(self, numbers: Numbers) -> Numbers:
        """The experts in the order in which they should get slots."""
        return numbers

    def uses_to_come(self, numbers: Numbers) -> NDArray[np.float64]:
        """How often each of these experts will be used, what is further off counting less, and
        without what a predictor says of the next use. 0 from a policy that cannot say."""
        return np.zeros(len(numbers))

    @abstractmethod
    def victims(
        self, candidates: Numbers, count: int, incoming: Numbers | None = None
    ) -> list[int]:
        """Up to `count` of the candidates, the least worth first. No candidate is in use.

        incoming: who wants the slots, most wanted first, where that is open to choice (a
        prefetch). Fewer than `count` then means: what is wanted is worth less than what is there.
        Without it the slots are needed now, and fewer means that there are no more to be had.
        """


class RankedPolicy(Policy):
    """A policy that gives every expert a number: its worth. The least goes first.

    selective: worth is comparable between experts that are held and those that are not, so what
    comes in by choice must be worth more than what goes. Otherwise it counts as worth its slot.
    """

    selective = False

    def __init__(self, numbers: ExpertNumbers) -> None:
        self.numbers = numbers

    @abstractmethod
    def worth(self, numbers: Numbers) -> NDArray[np.float64]:
        """What it is worth to hold each of these experts, in any unit that rises with it."""

    def loaded(self, number: int) -> None:
        """Most policies count uses, not arrivals."""

    def evicted(self, number: int) -> None:
        """Most policies remember experts that have lost their slot."""

    def by_preference(self, numbers: Numbers) -> Numbers:
        order = np.argsort(-self.worth(numbers), kind="stable")
        return numbers[order]

    def victims(
        self, candidates: Numbers, count: int, incoming: Numbers | None = None
    ) -> list[int]:
        chosen = least(candidates, self.worth(candidates), count)
        if incoming is None or not self.selective:
            return chosen
        gains = self.worth(incoming[: len(chosen)]) > self.worth(np.array(chosen, np.int64))
        return chosen[: len(chosen) if gains.all() else int(gains.argmin())]


def least(candidates: Numbers, worth: NDArray[np.float64], count: int) -> list[int]:
    """The `count` candidates of least worth, rising; ties by number."""
    if count == 1 and len(candidates):
        return [int(candidates[worth.argmin()])]
    if count < len(candidates):
        # Everything up to the worth of the last one chosen, ties included, so that the order of
        # candidates cannot matter.
        limit = np.partition(worth, count - 1)[count - 1]
        below = worth <= limit
        candidates, worth = candidates[below], worth[below]
    order = np.lexsort((candidates, worth))
    chosen: list[int] = candidates[order[:count]].tolist()
    return chosen
