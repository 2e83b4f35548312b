"""Experts follow experts: this token's of the layers before, the last token's of those to come.

What a token chose so far and what the token before it chose in the layers ahead say together what
comes next. For every layer there is a `LogLinear` from these experts to those of the next layers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from moeserve.chores import at_once
from moeserve.core import Routing
from moeserve.predictors.base import NOTHING, Prediction, Predictor, any_row
from moeserve.predictors.layers import LayerRing
from moeserve.predictors.log_linear import Floats, Ids, LogLinear
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


@dataclass(eq=False)
class _Said:
    """What a layer said of the next ones, until the last of these has run.

    rows: of the running step, whose rows those of `features` have become; None: the same rows.
    """

    features: Ids  # [T, C * K]
    chances: Floats  # [T, depth * E]
    rows: Ids | None = None

    def turn(self, links: RowLinks) -> None:
        """Another step begins: rows that nothing goes on from are left out."""
        self.features, self.chances = self.features[links.before], self.chances[links.before]
        self.rows = links.rows


class MarkovPredictor(Predictor):
    """P(wanted) of the next layers from the experts of this token and of the token before."""

    name = "markov"

    def __init__(self, num_experts: Mapping[int, int], depth: int) -> None:
        """num_experts: by the MoE layer's index in the model. depth: layers to look ahead, fewer
        where MAX_WEIGHT_BYTES are not enough for them and one layer behind."""
        count, self._widest = len(num_experts), max(num_experts.values())
        num_layers = MAX_WEIGHT_BYTES // (4 * self._widest**2 * count)  # depth times context
        while depth > 1 and depth * (depth + 1) > num_layers:
            depth -= 1
        self._ring = ring = LayerRing(num_experts, depth)
        behind = max(1, num_layers // ring.depth - ring.depth)
        self._num_context = min(count, behind + ring.depth)
        # what a layer speaks of, one after the other: [L, depth] places, their sizes, where they
        # begin among its outcomes
        place, ahead = np.arange(count)[:, None], np.arange(ring.depth)
        self._ahead: Ids = (place + 1 + ahead) % count
        sizes = np.array(list(ring.num_experts.values()))[self._ahead]
        self._starts: Ids = (np.cumsum(sizes, axis=1) - sizes)[:, :, None]  # [L, depth, 1]
        self._sizes: list[list[int]] = sizes.tolist()
        self._models = [
            LogLinear(self._num_context * self._widest, sum(of_layer)) for of_layer in self._sizes
        ]
        # the layers ahead, where the token before is the last that was seen, then those behind
        back = np.arange(self._num_context)
        self._context: Ids = (place + ring.depth - back) % count  # [L, C] places
        self._offsets: Ids = self._widest * back[:, None]  # [C, 1]
        self._chosen: Ids = np.zeros((0, count, 0), np.int64)  # [T, L, K] last of every layer
        self._said: dict[int, _Said] = {}  # by place
        self._has_bias = [False] * count
        self._links = RowLinks()
        self._layer = sys.maxsize  # whatever layer comes first begins a step
        self._place = -1  # of the last layer that was asked for

    def begin_step(self, previous_rows: NDArray[np.int64]) -> None:
        self._links.tell(previous_rows)
        self._layer = sys.maxsize  # whatever layer is asked for first

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """As the base class. The layers after the last one are those of the next token."""
        ids = routing.ids.cpu().numpy()
        if len(ids) == 0:
            return NOTHING
        begins = layer <= self._layer or len(ids) != len(self._chosen)
        if begins:
            self._turn(*ids.shape)
        place, expected = self._ring.place_of[layer], (self._place + 1) % len(self._ring.layers)
        if place != expected or begins != (place == 0):  # what came between was not seen
            self._said.clear()
        self._layer, self._place = layer, place
        self._chosen[:, place] = ids
        self._learn(place)
        return Prediction(self._say(place, ids.shape[1]))

    def _turn(self, num_rows: int, top_k: int) -> None:
        """A step begins: what was seen goes to the rows that go on from it."""
        links = self._links
        links.turn(num_rows)
        chosen = np.full((num_rows, len(self._ring.layers), top_k), UNKNOWN, np.int64)
        if len(links.rows):
            chosen[links.rows] = self._chosen[links.before]
        self._chosen = chosen
        first = len(self._ring.layers) - self._ring.depth  # that speaks of the next token
        late = {p: said for p, said in self._said.items() if p >= first and said.rows is None}
        for said in late.values():
            said.turn(links)
        self._said = late

    def _learn(self, place: int) -> None:
        """The layer that spoke of this one as its furthest learns from what came since."""
        source = (place - self._ring.depth) % len(self._ring.layers)
        said = self._said.pop(source, None)
        if said is None:
            return
        came = self._chosen[:, self._ahead[source]]  # [T, depth, K]
        if said.rows is not None:
            came = came[said.rows]
        if not len(came) or came.min() < 0:
            return
        errors = said.chances
        first = errors.shape[1] * np.arange(len(came))[:, None, None]
        errors.reshape(-1)[came + self._starts[source] + first] -= 1
        later = self.put_off if len(errors) <= MOST_ROWS_PUT_OFF else at_once
        later(partial(self._models[source].correct, said.features, errors))

    def _say(self, place: int, top_k: int) -> dict[int, Tensor]:
        model, ring = self._models[place], self._ring
        chosen = self._chosen[:, self._context[place]]  # [T, C, K]
        chosen += self._offsets
        features = chosen.reshape(len(chosen), -1)
        if not self._has_bias[place]:  # as many as a token chooses, before anything is known
            share = min(top_k / self._widest, 0.5)
            model.bias[:] = np.log(share / (1 - share))
            self._has_bias[place] = True
        chances = model.chances(features)
        self._said[place] = _Said(features, chances)
        wanted = torch.from_numpy(any_row(chances).copy())  # the other one learns
        aheads = ring.ahead_around(ring.layers[place])
        return dict(zip(aheads, wanted.split(self._sizes[place]), strict=True))
