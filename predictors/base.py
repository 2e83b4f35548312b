"""What a predictor is: after each layer's routing, which experts later layers will want."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from moeserve.chores import PutOff, at_once
from moeserve.core import Routing

if TYPE_CHECKING:
    from torch import Tensor

#: the chance of every expert of a layer to be wanted: [E], or by rows [T, E]
Chances = NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """For layers to come, the probability that each expert is wanted by any row of the batch.

    probabilities: by layer, [E] float32 on the CPU. Layers it says nothing about are absent. They
    hold until the predictor is asked from the same layer again.
    """

    probabilities: Mapping[int, Tensor] = field(default_factory=dict)


NOTHING: Final = Prediction()


class Predictor(ABC):
    """Called once per MoE layer and step, with what the router there really chose, before the
    layer's experts run: they are what prefetching has time beside.

    Layers come in rising order; a layer that does not rise begins another step.

    recent_tokens: how many of the last tokens of each row `foresee` wants, the row's own included;
    0 for a predictor that does not look at tokens.

    reads_rows: whether it looks at hidden states, which may be elsewhere.

    put_off: for what a predictor learns from a routing, if that takes time.
    """

    name: str
    recent_tokens: int = 0
    reads_rows: bool = True
    put_off: PutOff = staticmethod(at_once)

    def begin_step(self, previous_rows: NDArray[np.int64]) -> None:  # noqa: B027 - optional
        """previous_rows: [T], for every row of the step to come the row of the step before it that
        held the token before its own; -1 where none did.

        Nobody has to say: a predictor that cares takes it, unsaid, that two steps with the same
        number of rows are of the same sequences in the same order, and others have nothing in
        common. Where it is said, it is said of every step, also of one that `predict` will not be
        asked about, or only from some layer on. Wrong rows make a prediction worse, not wrong.
        """

    def foresee(self, recent: NDArray[np.int64]) -> Prediction:
        """What a step will want, from its tokens alone, before its first layer runs.

        recent: [T, recent_tokens] token ids of every row of the step to come, the row's own last,
        -1 before the text. To be called after `begin_step`, if tokens are wanted.
        """
        return NOTHING

    def look_on(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """In place of `predict` where nobody wants a prediction, as none has paid of late: says
        nothing. One that learns may look now and then (`LookingOn`), else it would be as wrong at
        the next try; it must cost next to nothing."""
        return NOTHING

    @abstractmethod
    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """What follows after `layer`, whose input was x [T, H]. May learn from `routing`."""


def any_row(chances: Chances) -> Chances:
    """[T, E] chances of the rows to [E]: that any row wants the expert, 1 - prod(1 - p).

    Takes the rows as independent given what is known of each. Rows of one text are not, so of large
    batches it says a little too much.
    """
    if len(chances) == 1:
        first: Chances = chances[0]
        return first
    missed: Chances = np.prod(1 - chances, axis=0)
    return 1 - missed
