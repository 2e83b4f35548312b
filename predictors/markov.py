"""Experts follow experts: this token's of the layers before, the last token's of the same layer.

Counts are taken while serving. An expert's odds are its odds of late, times how much each expert
that is known to be chosen raises them (the lift P(e | e') / P(e)), each lift to a power below one:
they are far from independent, and taken whole they would be counted several times over.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from moeserve.core import Routing
from moeserve.predictors.base import Chances, Prediction, Predictor, any_row
from moeserve.predictors.layers import LayerRing
from moeserve.predictors.row_links import RowLinks

if TYPE_CHECKING:
    from torch import Tensor

Ids = NDArray[np.int64]
Counts = NDArray[np.float32]

#: observations after which one counts half
HALF_LIFE_TOKENS = 8192
#: observations' worth of belief that nothing follows from an expert
BACKOFF_TOKENS = 8.0
#: powers of the lifts, to be divided by the experts per token. Tried by log-likelihood on
#: routing of GPT-OSS-20B (K = 4) and DeepSeek-V2-Lite (K = 6): best are 2, and 1.2 to 1.8
LAYER_WEIGHT = 2.0
TOKEN_WEIGHT = 1.5
#: chances are kept that far from 0 and 1, where a single observation would decide
LEAST_CHANCE = 1e-4


class Transitions:
    """How often one expert was followed by another, older observations counting less.

    Instead of fading all counts with every observation, new ones weigh more.
    """

    def __init__(self, num_before: int, num_after: int, half_life_tokens: float) -> None:
        self._pairs: Counts = np.zeros((num_before, num_after), np.float32)
        self._before: Counts = np.zeros(num_before, np.float32)
        self._after: Counts = np.zeros(num_after, np.float32)
        self._tokens = 0.0
        self._weight = 1.0
        self._growth = 2 ** (1 / half_life_tokens)

    def add(self, before: Ids, after: Ids) -> None:
        """before: [T, K], after: [T, K'] experts of the same T rows."""
        weight = self._weight
        if len(before) == 1:
            self._pairs[before[0][:, None], after[0]] += weight
            self._before[before[0]] += weight
            self._after[after[0]] += weight
        else:
            first = one_hot(before, len(self._before))
            second = one_hot(after, len(self._after))
            self._pairs += weight * (first.T @ second)
            self._before += weight * first.sum(0)
            self._after += weight * second.sum(0)
        self._tokens += weight * len(before)
        self._weight *= self._growth ** len(before)
        if self._weight > 1e6:
            self._rescale()

    def _rescale(self) -> None:
        for counts in (self._pairs, self._before, self._after):
            counts /= self._weight
        self._tokens /= self._weight
        self._weight = 1.0

    @property
    def any(self) -> bool:
        """Whether there is a count to speak from."""
        return self._tokens > 0.0

    def odds(self) -> Counts:
        """[E']: log odds of each following expert whatever came before."""
        return log_odds(self._after / np.float32(self._tokens))

    def lifts(self, before: Ids) -> Counts:
        """[T, K] to [T, E']: by how much the log odds rise, summed over the experts before."""
        weight = np.float32(self._weight * BACKOFF_TOKENS)  # as many tokens of today
        share = self._after / np.float32(self._tokens)
        counts = self._pairs[before]  # [T, K, E']
        counts += weight * share
        counts /= (self._before[before] + weight)[..., None]
        raised: Counts = log_odds(counts).sum(axis=1)
        raised -= before.shape[1] * log_odds(share)
        return raised


def one_hot(ids: Ids, count: int) -> Counts:
    """[T, K] ids to [T, count]: 1 where chosen."""
    chosen: Counts = np.zeros((len(ids), count), np.float32)
    np.put_along_axis(chosen, ids, 1, axis=1)
    return chosen


def log_odds(chances: Chances) -> Counts:
    """ln(p / (1 - p))."""
    bounded = np.clip(chances, LEAST_CHANCE, 1 - LEAST_CHANCE)
    result: Counts = np.log(bounded / (1 - bounded))
    return result


class MarkovPredictor(Predictor):
    """P(wanted) of the next layers from the experts of this layer and of the token before."""

    name = "markov"

    def __init__(
        self,
        num_experts: Mapping[int, int],
        depth: int,
        half_life_tokens: float = HALF_LIFE_TOKENS,
    ) -> None:
        """num_experts: by the MoE layer's index in the model. depth: layers to look ahead."""
        self._ring = LayerRing(num_experts, depth)
        sizes = self._ring.num_experts
        # of the same token, by (layer seen from, layer seen), the last ones seeing the next token
        self._across = {
            (layer, ahead): Transitions(sizes[layer], sizes[ahead], half_life_tokens)
            for layer in sizes
            for ahead in self._ring.ahead_around(layer)
        }
        self._along = {
            layer: Transitions(count, count, half_life_tokens) for layer, count in sizes.items()
        }
        self._now: dict[int, Ids] = {}  # experts by layer, of the running step
        self._last: dict[int, Ids] = {}  # of the step before, in the order of this step's rows
        self._links = RowLinks()
        self._layer = sys.maxsize  # whatever layer comes first begins a step

    def begin_step(self, previous_rows: NDArray[np.int64]) -> None:
        self._links.tell(previous_rows)

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        """As the base class. The layers after the last one are those of the next token."""
        ids = routing.ids.cpu().numpy()
        if len(ids) == 0:
            return Prediction()
        if layer <= self._layer:
            self._links.turn(len(ids))
            self._last = {behind: done[self._links.before] for behind, done in self._now.items()}
            self._now = {}
        self._layer = layer
        self._learn(layer, ids)
        self._now[layer] = ids
        found = {}
        for ahead in self._ring.ahead_around(layer):
            chances = self._chances(layer, ahead, ids)
            if chances is not None:
                found[ahead] = torch.from_numpy(any_row(chances))
        return Prediction(found)

    def _learn(self, layer: int, ids: Ids) -> None:
        """Counts what led to this layer's experts."""
        last = self._last
        known = ids[self._links.rows]
        for behind in self._ring.behind_around(layer):
            if behind in self._now:
                self._across[behind, layer].add(self._now[behind], ids)
            elif behind in last and len(known):
                self._across[behind, layer].add(last[behind], known)
        if layer in last and len(known):
            self._along[layer].add(last[layer], known)

    def _chances(self, layer: int, ahead: int, ids: Ids) -> Chances | None:
        """[T, E] of layer `ahead`, seen from `layer`; None before anything is known of it."""
        across = self._across[layer, ahead]
        if not across.any:
            return None
        score = across.odds() + (LAYER_WEIGHT / ids.shape[1]) * across.lifts(ids)  # [T, E]
        before, rows = self._last.get(ahead), self._links.rows
        if ahead in self._now:  # of the next token, whose token before is this one
            before, rows = self._now[ahead], np.arange(len(ids))
        along = self._along[ahead]
        if before is not None and len(before) and along.any:
            score[rows] += (TOKEN_WEIGHT / before.shape[1]) * along.lifts(before)
        chances: Chances = 1 / (1 + np.exp(-score))
        return chances
