"""Prefetching that watches its own use: what came of it decides how far it looks ahead."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.expert_cache import ExpertCache
from moeserve.cache.types import Load
from moeserve.core import ExpertKey, Placement, Routing
from moeserve.experts.schedule.inter_layer import (
    ImpactPrefetch,
    InterLayerScheduler,
    whatever,
)
from moeserve.experts.schedule.intra_layer import SimulatedPlacement
from moeserve.predictors.base import Prediction, Predictor
from moeserve.predictors.usefulness import PrefetchUsefulness

if TYPE_CHECKING:
    from torch import Tensor

NOTHING = Prediction()
#: calls after which the link's load is looked at again
REVIEW_CALLS = 256


class WatchedPrefetch(InterLayerScheduler):
    """`ImpactPrefetch`, over the distances at which it has paid.

    Also tells the cache's policy what is predicted: an expert about to be wanted is no victim.
    """

    def __init__(
        self,
        cache: ExpertCache,
        intra: SimulatedPlacement,
        start: Callable[[tuple[Load, ...]], None],
        busy_s: Callable[[], float],
        max_depth: int,
        clock: Callable[[], float] = time.perf_counter,
        can_begin: Callable[[ExpertKey], bool] = whatever,
    ) -> None:
        """start: hands loads to whoever moves bytes, as prefetches. busy_s: for how many seconds
        the link has been moving anything so far. max_depth: layers to look ahead. can_begin: as
        `ImpactPrefetch` has it."""
        self._cache = cache
        self._start = start
        self._busy_s = busy_s
        self._clock = clock
        layers = cache.numbers.layers
        self._rank = {layer: rank for rank, layer in enumerate(layers)}
        # On a link that is always busy, a wrong prefetch delays as much as a right one saves; on
        # one that idles it delays nothing. Until the link is known it is taken for busy.
        self.usefulness = PrefetchUsefulness(layers, max_depth, break_even=0.5)
        self._impact = ImpactPrefetch(cache, intra, self._begin, self._depth, clock, can_begin)
        #: by layer: (expert, the layer that asked for it, how many layers ahead)
        self._pending: dict[int, list[tuple[int, int, int]]] = {layer: [] for layer in layers}
        self._source = 0
        self._distances: tuple[int, ...] = ()
        self._num_calls = 0
        self._reviewed = (clock(), busy_s())

    def prefetch(self, prediction: Prediction, protect: Placement) -> None:
        self._judge(protect)
        self._review()
        for layer, chances in prediction.probabilities.items():
            self._cache.expect(layer, chances.numpy())
        self._source = protect.layer
        # Once a step for every layer: one that says nothing, after what was foreseen, is no other.
        self._distances = (
            self.usefulness.distances(protect.layer) if prediction.probabilities else ()
        )
        self._impact.prefetch(prediction, protect)

    def _depth(self, layer: int) -> int:
        return max(self._distances, default=0)

    def _begin(self, loads: tuple[Load, ...]) -> None:
        size = len(self._rank)
        for layer, expert in (load.key for load in loads):
            distance = (self._rank[layer] - self._rank[self._source]) % size or size
            if distance <= self.usefulness.max_depth:
                self._pending[layer].append((expert, self._source, distance))
        self._start(loads)

    def _judge(self, placement: Placement) -> None:
        """What was brought for this layer is used now, or was brought in vain."""
        pending = self._pending[placement.layer]
        if not pending:
            return
        wanted = {*placement.on_device, *placement.fetch_first, *placement.on_cpu}
        for expert, source, distance in pending:
            used = expert in wanted
            self.usefulness.record(source, distance, int(used), int(not used))
        pending.clear()

    def _review(self) -> None:
        self._num_calls += 1
        if self._num_calls % REVIEW_CALLS:
            return
        now_s, busy_s = self._clock(), self._busy_s()
        then_s, busy_then_s = self._reviewed
        if now_s > then_s:
            share = min(1.0, (busy_s - busy_then_s) / (now_s - then_s))
            self.usefulness.break_even = 0.5 * share
        self._reviewed = (now_s, busy_s)


class PredictorInNeed(Predictor):
    """Predicts while there is something to fetch; where all experts have come in, it costs nothing.

    A predictor that learns from what it sees misses those steps.
    """

    def __init__(self, predictor: Predictor, cache: ExpertCache) -> None:
        self.name = predictor.name
        self.recent_tokens = predictor.recent_tokens
        self._predictor = predictor
        self._cache = cache

    def begin_step(self, previous_rows: NDArray[np.int64]) -> None:
        self._predictor.begin_step(previous_rows)

    def foresee(self, recent: NDArray[np.int64]) -> Prediction:
        return NOTHING if self._cache.holds_everything else self._predictor.foresee(recent)

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        if self._cache.holds_everything:
            return NOTHING
        return self._predictor.predict(layer, x, routing)
