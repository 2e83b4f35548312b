"""Experts follow experts: this token's of the layers before, the last token's of those to come.

What a token chose so far and what the token before it chose in the layers ahead say together what
comes next. For every layer there is a `LogLinear` from these experts to those of the next layers.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moeserve.chores import at_once
from moeserve.core import Routing
from moeserve.predictors.base import NOTHING, Prediction, Predictor, any_row
from moeserve.predictors.layers import LayerRing
from moeserve.predictors.log_linear import Floats, Ids, LogLinear
from moeserve.predictors.looking_on import LookingOn
from moeserve.predictors.row_links import RowLinks

if TYPE_CHECKING:
    from torch import Tensor

#: memory for the weights: a model with more experts looks at fewer layers behind and ahead
MAX_WEIGHT_BYTES = 128 << 20
#: rows of a step beyond which learning is not put off: what waits would take memory, and time of a
#: later step that it has not
MOST_ROWS_PUT_OFF = 32
#: what a row chose where nobody has seen it: below 0 as a feature, too
UNKNOWN = -(1 << 32)


@dataclass(frozen=True)
class MarkovShape:
    """What every layer looks at and speaks of.

    sizes: experts of each layer, by place. depth: layers that it speaks of. num_context: layers
    that it looks at: those that it speaks of, where the token before is the last that was seen,
    then its own and those behind it, around the end.
    """

    sizes: tuple[int, ...]
    depth: int
    num_context: int

    @staticmethod
    def fitting(sizes: tuple[int, ...], depth: int) -> MarkovShape:
        """What MAX_WEIGHT_BYTES suffice for: fewer layers ahead where they are not enough for those
        and one layer behind, else fewer behind."""
        num_layers = MAX_WEIGHT_BYTES // (4 * max(sizes) ** 2 * len(sizes))  # depth times context
        while depth > 1 and depth * (depth + 1) > num_layers:
            depth -= 1
        behind = max(1, num_layers // depth - depth)
        return MarkovShape(sizes, depth, min(len(sizes), behind + depth))

    @property
    def widest(self) -> int:
        return max(self.sizes)

    @cached_property
    def ahead(self) -> Ids:
        """[L, depth] places, nearest first."""
        places = np.arange(len(self.sizes))[:, None] + 1 + np.arange(self.depth)
        ahead: Ids = places % len(self.sizes)
        return ahead

    @cached_property
    def context(self) -> Ids:
        """[L, C] places."""
        places = np.arange(len(self.sizes))[:, None] + self.depth - np.arange(self.num_context)
        context: Ids = places % len(self.sizes)
        return context

    @cached_property
    def sizes_ahead(self) -> list[list[int]]:
        """[L][depth]: of the experts of the layers ahead, which are a place's outcomes."""
        sizes: list[list[int]] = np.array(self.sizes)[self.ahead].tolist()
        return sizes


class MarkovModel(Protocol):
    """The weights of all layers, and what they have said of late."""

    def turn(self, links: RowLinks, num_rows: int, top_k: int) -> None:
        """A step begins: what was seen goes to the rows that go on from it."""

    def forget(self) -> None:
        """Layers were not seen: nothing is to be learnt from what was said so far."""

    def see(self, place: int, ids: Ids) -> bool:
        """ids: [T, K], what the rows chose there. True: `learn` has one thing more to do."""

    def learn(self) -> None:
        """The oldest thing there is to learn; once for each `see` that was true."""

    def say(self, place: int) -> None:
        """The chance of every outcome of the place that any row wants it, into its `out`."""


#: from the shape and from each place's `out`, [outcomes] float32. Tensors, because predictions are
#: views of them, and who copies a predictor (`copy.deepcopy`) must get views of the copy
MakeMarkovModel = Callable[["MarkovShape", "list[Tensor]"], MarkovModel]


@dataclass(eq=False)
class _Said:
    """What a layer said of the next ones, until the last of these has run.

    rows: of the running step, whose rows those of `features` have become; None: the same rows.
    """

    features: Ids  # [T, C * K]
    chances: Floats  # [T, outcomes]
    rows: Ids | None = None

    def turn(self, links: RowLinks) -> None:
        """Another step begins: rows that nothing goes on from are left out."""
        self.features, self.chances = self.features[links.before], self.chances[links.before]
        self.rows = links.rows


class NumpyMarkovModel:
    """`MarkovModel` by numpy."""

    def __init__(self, shape: MarkovShape, out: list[Tensor]) -> None:
        self._shape, self._out = shape, out
        sizes = np.array(shape.sizes_ahead)
        # where the experts of each layer ahead begin among the outcomes: [L, depth, 1]
        self._starts: Ids = (np.cumsum(sizes, axis=1) - sizes)[:, :, None]
        features = shape.num_context * shape.widest
        self.models = [LogLinear(features, sum(of_layer)) for of_layer in shape.sizes_ahead]
        self._offsets: Ids = shape.widest * np.arange(shape.num_context)[:, None]  # [C, 1]
        self._chosen: Ids = np.zeros((0, len(shape.sizes), 0), np.int64)  # [T, L, K]
        self._said: dict[int, _Said] = {}  # by place
        self._to_learn: deque[tuple[int, _Said]] = deque()
        self._has_bias = [False] * len(shape.sizes)

    def turn(self, links: RowLinks, num_rows: int, top_k: int) -> None:
        num_layers = len(self._shape.sizes)
        chosen = np.full((num_rows, num_layers, top_k), UNKNOWN, np.int64)
        if len(links.rows):
            chosen[links.rows] = self._chosen[links.before]
        self._chosen = chosen
        first = num_layers - self._shape.depth  # that speaks of the next token
        late = {p: said for p, said in self._said.items() if p >= first and said.rows is None}
        for said in late.values():
            said.turn(links)
        self._said = late

    def forget(self) -> None:
        self._said.clear()

    def see(self, place: int, ids: Ids) -> bool:
        self._chosen[:, place] = ids
        # whose furthest layer this one is: all that it spoke of has run
        source = (place - self._shape.depth) % len(self._shape.sizes)
        said = self._said.pop(source, None)
        if said is None:
            return False
        came = self._chosen[:, self._shape.ahead[source]]  # [T, depth, K]
        if said.rows is not None:
            came = came[said.rows]
        if not len(came) or came.min() < 0:
            return False
        errors = said.chances
        first = errors.shape[1] * np.arange(len(came))[:, None, None]
        errors.reshape(-1)[came + self._starts[source] + first] -= 1
        self._to_learn.append((source, said))
        return True

    def learn(self) -> None:
        source, said = self._to_learn.popleft()
        self.models[source].correct(said.features, said.chances)

    def say(self, place: int) -> None:
        model, widest = self.models[place], self._shape.widest
        chosen = self._chosen[:, self._shape.context[place]]  # [T, C, K]
        chosen += self._offsets
        features = chosen.reshape(len(chosen), -1)
        if not self._has_bias[place]:  # as many as a token chooses, before anything is known
            share = min(self._chosen.shape[2] / widest, 0.5)
            model.bias[:] = np.log(share / (1 - share))
            self._has_bias[place] = True
        chances = model.chances(features)
        self._said[place] = _Said(features, chances)
        self._out[place].copy_(torch.from_numpy(any_row(chances)))


class MarkovPredictor(Predictor):
    """P(wanted) of the next layers from the experts of this token and of the token before."""

    name = "markov"
    reads_rows = False

    def __init__(
        self,
        num_experts: Mapping[int, int],
        depth: int,
        make_model: MakeMarkovModel = NumpyMarkovModel,
    ) -> None:
        """num_experts: by the MoE layer's index in the model. depth: layers to look ahead, fewer
        where MAX_WEIGHT_BYTES are not enough for them and one layer behind."""
        sizes = LayerRing(num_experts, depth).num_experts
        self.shape = shape = MarkovShape.fitting(tuple(sizes.values()), min(depth, len(sizes)))
        self._ring = ring = LayerRing(num_experts, shape.depth)
        out = [torch.zeros(sum(of_layer)) for of_layer in shape.sizes_ahead]
        self._predictions = [
            Prediction(dict(zip(ring.ahead_around(layer), chances.split(of_layer), strict=True)))
            for layer, chances, of_layer in zip(ring.layers, out, shape.sizes_ahead, strict=True)
        ]
        self.model = make_model(shape, out)
        self._links = RowLinks()
        self._looking_on = LookingOn()
        self._num_rows = 0
        self._layer = sys.maxsize  # whatever layer comes first begins a step
        self._place = -1  # of the last layer that was asked for

    def begin_step(self, previous_rows: NDArray[np.int64]) -> None:
        self._links.tell(previous_rows)
        self._layer = sys.maxsize  # whatever layer is asked for first

    def look_on(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        if self._looking_on.looks(layer):
            self.predict(layer, x, routing)
        return NOTHING

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """As the base class. The layers after the last one are those of the next token."""
        ids = routing.ids.cpu().numpy()
        num_rows, top_k = ids.shape
        if not num_rows:
            return NOTHING
        begins = layer <= self._layer or num_rows != self._num_rows
        if begins:
            self._links.turn(num_rows)
            self.model.turn(self._links, num_rows, top_k)
            self._num_rows = num_rows
        place, expected = self._ring.place_of[layer], (self._place + 1) % len(self._ring.layers)
        if place != expected or begins != (place == 0):  # what came between was not seen
            self.model.forget()
        self._layer, self._place = layer, place
        if self.model.see(place, ids):
            later = self.put_off if num_rows <= MOST_ROWS_PUT_OFF else at_once
            later(self.model.learn)
        self.model.say(place)
        return self._predictions[place]
