"""The experts of all layers from the tokens alone, before the model runs.

Read-ME (arXiv:2410.19123, section 3) takes routing out of the backbone: one small causal block on
the tokens chooses for all layers, so a server knows a step's experts before the step. Here such a
block is trained to foresee what the layers' own routers will choose, and decides nothing.

    q, o = tables[t_0]; k_j, v_j = tables[t_j]            the last tokens t_0 (own), t_1, ...
    a    = softmax_j(q . k_j + place_j) v_j               per head, over the last `window` tokens
    s    = o + a
    p    = sigmoid(s W_direct + silu(s W_in + b_in) W_out + b)     [L * E]

The tables are the model's embedding, projected when the block was trained, so that a step needs
nothing of the model. All of it follows from the last tokens of a sequence: there is no state that a
cached prefix, a preempted sequence or another batch could be without.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from moeserve.core import ConfigError, Routing
from moeserve.predictors.base import NOTHING, Chances, Prediction, Predictor, any_row
from moeserve.predictors.layers import LayerRing

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

#: logits are held within: no chance is nearer to 0 or 1 than can be known
MOST_LOGIT = np.float32(9.0)
#: score of a place before the text began
NOBODY = np.float32(-1e30)
#: rows that are computed together
TOGETHER = 512


@dataclass(frozen=True)
class PregateShape:
    """Sizes of the block. window: tokens that it sees, own one included. heads divides rank."""

    window: int = 16
    rank: int = 32
    heads: int = 4
    units: int = 128

    def __post_init__(self) -> None:
        for name in ("window", "rank", "heads", "units"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; allowed: 1 or more", field=name)
        if self.rank % self.heads:
            raise ConfigError(
                f"heads: {self.heads} does not divide rank {self.rank}", field="heads"
            )


@dataclass(frozen=True)
class PregateWeights:
    """V tokens, R rank, A heads, W window, U units, O = layers * experts outputs.

    own: [V, 2 R] float16, query and own state of a token. context: [V, 2 R] float16, its key and
    value. place: [A, W], what is added to the scores, the own token last. hidden_in [R, U],
    hidden_bias [U], hidden_out [U, O], direct [R, O], bias [O], all float32.
    """

    own: NDArray[np.float16]
    context: NDArray[np.float16]
    place: Floats
    hidden_in: Floats
    hidden_bias: Floats
    hidden_out: Floats
    direct: Floats
    bias: Floats

    def row_chances(self, recent: Ids) -> Chances:
        """recent: [T, W] token ids, the own one last, -1 before the text. Returns [T, O]."""
        if len(recent) > TOGETHER:
            parts = range(0, len(recent), TOGETHER)
            return np.concatenate([self.row_chances(recent[n : n + TOGETHER]) for n in parts])
        own = self.own[recent[:, -1]].astype(np.float32)
        context = self.context[recent].astype(np.float32)  # the row of -1 is any, and masked
        rows, window, width = context.shape
        rank, heads = width // 2, len(self.place)
        query = own[:, :rank].reshape(rows, heads, -1, 1)
        pairs = context.reshape(rows, window, 2, heads, -1).transpose(2, 0, 3, 1, 4)
        scores = np.matmul(pairs[0], query)[..., 0] + self.place  # [T, A, W]
        scores += np.where(recent < 0, NOBODY, np.float32(0))[:, None]
        scores -= scores.max(axis=-1, keepdims=True)
        shares = np.exp(scores, out=scores)
        shares /= shares.sum(axis=-1, keepdims=True)
        state = own[:, rank:] + np.matmul(shares[..., None, :], pairs[1]).reshape(rows, rank)
        inner = state @ self.hidden_in + self.hidden_bias
        inner /= 1 + np.exp(-np.clip(inner, -80, 80))  # silu
        logits = state @ self.direct + inner @ self.hidden_out + self.bias
        chances: Chances = 1 / (1 + np.exp(-np.clip(logits, -MOST_LOGIT, MOST_LOGIT)))
        return chances


PARTS = tuple(each.name for each in fields(PregateWeights))


class PregatePredictor(Predictor):
    """P(wanted) of all layers of a step, computed once, before its first layer."""

    name = "pregate"
    reads_rows = False

    def __init__(self, weights: PregateWeights, layers: Sequence[int], depth: int) -> None:
        """layers: the MoE layers, in rising order. depth: layers to say something about at once,
        after the first time in a step."""
        self._weights = weights
        self.recent_tokens = weights.place.shape[1]
        num_experts = len(weights.bias) // len(layers)
        ring = LayerRing(dict.fromkeys(layers, num_experts), depth)
        chances = torch.zeros(len(layers), num_experts)
        self._out: Floats = chances.numpy()
        each = dict(zip(layers, chances.unbind(), strict=True))
        self._all = Prediction(each)
        self._ahead = {
            layer: Prediction({later: each[later] for later in ring.ahead(layer)})
            for layer in layers
        }
        self._layer = sys.maxsize  # nothing is known before the first step's tokens

    def begin_step(self, previous_rows: Ids) -> None:
        """What was foreseen was of the step before."""
        self._layer = sys.maxsize

    def foresee(self, recent: Ids) -> Prediction:
        """As the base class: all layers."""
        if len(recent) == 0:
            self._layer = sys.maxsize
            return NOTHING
        chances = any_row(self._weights.row_chances(recent))
        self._out[:] = chances.reshape(self._out.shape)
        self._layer = -1
        return self._all

    def predict(self, layer: int, x: torch.Tensor, routing: Routing) -> Prediction:
        """As the base class; nothing of a step of which no tokens were told."""
        if layer <= self._layer:
            self._layer = sys.maxsize  # a layer that does not rise: the next step, unannounced
        if self._layer == sys.maxsize:
            return NOTHING
        self._layer = layer
        return self._ahead[layer]
