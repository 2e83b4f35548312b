"""Prefetching that watches its own use: what came of it decides how far it looks ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from moeserve.cache.expert_cache import ExpertCache
from moeserve.cache.types import ExpertState, Load
from moeserve.core import ExpertKey, Placement
from moeserve.experts.schedule.device_prefetch import DevicePrefetch
from moeserve.experts.schedule.inter_layer import (
    ImpactPrefetch,
    InterLayerScheduler,
    WhichBegin,
    whatever,
)
from moeserve.experts.schedule.intra_layer import SimulatedPlacement
from moeserve.predictors.base import NOTHING, Chances, Prediction
from moeserve.predictors.usefulness import LATE_SHARE, PrefetchUsefulness, Returns, Switch

#: calls after which the link's load is looked at again
REVIEW_CALLS = 256
#: the share of prefetches that must be used where the link is always busy. Less than one for one: a
#: demand stops a prefetch that is under way, so a wrong one only keeps others from being early. On
#: GPT-OSS-20B's decode over a disk 0 to 0.3 do equally well, 0.5 takes 2 % longer (docs/log.md)
BREAK_EVEN = 0.25


class WatchedPrefetch(InterLayerScheduler):
    """`ImpactPrefetch`, over the distances at which it has paid.

    Nothing is predicted where every expert has come in, or where prefetching as a whole takes more
    time than it saves; that is tried again later. A predictor that learns from what it sees misses
    those steps.

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
        can_begin: WhichBegin = whatever,
        left_us: Callable[[], float] | None = None,
    ) -> None:
        """start: hands loads to whoever moves bytes, as prefetches. busy_s: for how many seconds
        the link has been moving anything so far. max_depth: layers to look ahead. can_begin: as
        `ImpactPrefetch` has it. left_us: of the link to a device, as `DevicePrefetch` has it."""
        self._cache = cache
        self._start = start
        self._busy_s = busy_s
        self._clock = clock
        layers = cache.numbers.layers
        self._rank = {layer: rank for rank, layer in enumerate(layers)}
        # On a link that idles a wrong prefetch delays nothing. Until the link is known it is taken
        # for busy.
        self.usefulness = PrefetchUsefulness(layers, max_depth, break_even=BREAK_EVEN)
        args = (cache, intra, self._begin, self._depth, clock, can_begin)
        self._impact = (
            ImpactPrefetch(*args) if left_us is None else DevicePrefetch(*args, left_us=left_us)
        )
        #: by layer: (expert, the layer that asked for it, how many layers ahead)
        self._pending: dict[int, list[tuple[int, int, int]]] = {layer: [] for layer in layers}
        self._source = 0
        self._told: Mapping[int, Chances] = {}  # of the running call
        self._distances: tuple[int, ...] = ()
        self._num_calls = 0
        self._reviewed = (clock(), busy_s())
        self._returns = Returns()
        self._whole = Switch(self._returns)
        # A step may break off, and not every layer of it is asked about: where it begins shows.
        self._step, self._last_rank = 0, len(layers)
        self._asked_s: float | None = None  # when a prediction was asked for
        self._rests = False  # in this layer's step; what others were told is not followed

    def looks_ahead(self, layer: int) -> bool:
        """As the base class. What is then predicted counts as its own time."""
        rank = self._rank[layer]
        self._step += rank <= self._last_rank
        self._last_rank = rank
        allowed = not self._cache.holds_everything and self._whole.allows(self._step, break_even=1)
        self._rests = not allowed
        self._asked_s = self._clock() if allowed else None
        return allowed

    def prefetch(self, prediction: Prediction, protect: Placement) -> None:
        self._prefetch(NOTHING if self._rests else prediction, protect)
        if self._asked_s is not None:
            self._returns.spend((self._clock() - self._asked_s) * 1e6)
        self._asked_s, self._rests = None, False

    def _prefetch(self, prediction: Prediction, protect: Placement) -> None:
        self._judge(protect)
        self._review()
        told = {layer: chances.numpy() for layer, chances in prediction.probabilities.items()}
        for layer, chances in told.items():
            self._cache.expect(layer, chances)
        self._source, self._told = protect.layer, told
        # Once a step for every layer: one that says nothing, after what was foreseen, is no other.
        self._distances = (
            self.usefulness.distances(protect.layer) if prediction.probabilities else ()
        )
        self._impact.prefetch(prediction, protect)

    def _depth(self, layer: int) -> int:
        return max(self._distances, default=0)

    def _begin(self, loads: tuple[Load, ...]) -> None:
        """Only what was predicted can come true or not: what is brought for uses some time later
        says nothing of predictions."""
        size = len(self._rank)
        for layer, expert in (load.key for load in loads):
            distance = (self._rank[layer] - self._rank[self._source]) % size or size
            chances = self._told.get(layer)
            guessed = chances is not None and len(chances) * chances[expert] > chances.sum()
            if guessed and distance <= self.usefulness.max_depth:
                self._pending[layer].append((expert, self._source, distance))
        self._start(loads)

    def _judge(self, placement: Placement) -> None:
        """What was brought for this layer is used now, or was brought in vain."""
        pending = self._pending[placement.layer]
        if not pending:
            return
        wanted = {*placement.on_device, *placement.fetch_first, *placement.on_cpu}
        saved_us = self._impact.saved_us(placement.layer)
        for expert, source, distance in pending:
            used = expert in wanted
            self.usefulness.record(source, distance, int(used), int(not used))
            if used:
                key = ExpertKey(placement.layer, expert)
                in_time = self._cache.state(key) is ExpertState.READY
                self._returns.save(saved_us if in_time else LATE_SHARE * saved_us)
        pending.clear()

    def _review(self) -> None:
        self._num_calls += 1
        if self._num_calls % REVIEW_CALLS:
            return
        now_s, busy_s = self._clock(), self._busy_s()
        then_s, busy_then_s = self._reviewed
        if now_s > then_s:
            share = min(1.0, (busy_s - busy_then_s) / (now_s - then_s))
            self.usefulness.break_even = BREAK_EVEN * share
        self._reviewed = (now_s, busy_s)
