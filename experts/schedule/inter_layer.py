"""Between layers: what to bring into the fast tier before it is asked for."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.expert_cache import ExpertCache, ExpertState, Load
from moeserve.cache.numbering import Numbers
from moeserve.core import ExpertKey, Placement
from moeserve.cpu_backend import _native
from moeserve.experts.schedule.intra_layer import SimulatedPlacement
from moeserve.predictors.base import Prediction

#: of the time between two calls, how much the latest counts
PERIOD_WEIGHT = 1 / 16
#: of the link's price, likewise
PRICE_WEIGHT = 1 / 8


#: by experts' numbers [n]: which of them the source has, [n]
WhichBegin: TypeAlias = Callable[[Numbers], NDArray[np.bool_]]


def whatever(numbers: Numbers) -> NDArray[np.bool_]:
    """A source that has every expert."""
    return np.ones(len(numbers), np.bool_)


class InterLayerScheduler(ABC):
    """Turns predictions into prefetches."""

    def looks_ahead(self, layer: int) -> bool:
        """Whether it wants to be told what follows after `layer`, which is about to run: predicting
        takes time. Once a step for every layer, before `prefetch`."""
        return True

    @abstractmethod
    def prefetch(self, prediction: Prediction, protect: Placement) -> None:
        """Starts what pays. Never evicts what `protect`, the running layer, needs, and never delays
        a demand fetch (DESIGN, invariant 2)."""


class ResidentPrefetch(InterLayerScheduler):
    """Everything is in the fast tier already: there is nothing to bring."""

    def looks_ahead(self, layer: int) -> bool:
        return False

    def prefetch(self, prediction: Prediction, protect: Placement) -> None:
        """Nothing is absent, so no prediction can name anything to move."""


class Likely(NamedTuple):
    """What `likely_absent` says of one layer. place: of the layer among those that were asked
    about. total: of its chances. num_absent: of as many likeliest experts as `total` says. experts:
    absent, and likelier than one taken at random, likeliest first; chances: of these."""

    place: int
    total: float
    num_absent: int
    experts: list[int]
    chances: list[float]


@dataclass(frozen=True)
class Candidate:
    """gain_us: by how much its layer is shorter if it has arrived when that layer begins, times
    its chance to be wanted beyond that of an expert taken at random. slack_us: until then."""

    key: ExpertKey
    gain_us: float
    chance: float
    slack_us: float

    def net_us(self, arrives_us: float) -> float:
        """What is left of the gain when it arrives after that time: an expert that is late is
        waited for."""
        return self.gain_us - self.chance * max(0.0, arrives_us - self.slack_us)


class ImpactPrefetch(InterLayerScheduler):
    """Ranks what is predicted and absent by the time that its arrival would save.

    The impact of an expert is the length of its layer, as the intra-layer scheduler would place it,
    without it and with it (HybriMoE, arXiv 2504.05897, impact-driven prefetching), times the chance
    that it is wanted. Three things are added:

    - Chances count beyond those of an expert taken at random, which is what the slot that it takes
      is worth: with all chances equal nothing is predicted and nothing is moved.
    - What cannot arrive before its layer is worth less by the time it is late.
    - The link is kept busy until the next call and no longer: that one knows more.

    To be called before the layer of `protect` runs, so that the link moves beside it.
    """

    def __init__(
        self,
        cache: ExpertCache,
        intra: SimulatedPlacement,
        start: Callable[[tuple[Load, ...]], None],
        depth: Callable[[int], int],
        clock: Callable[[], float] = time.perf_counter,
        can_begin: WhichBegin = whatever,
    ) -> None:
        """start: hands loads to whoever moves bytes, as prefetches. depth: for how many layers
        after the given one predictions are followed. clock: in seconds. can_begin: which
        experts the source has; what it has not is left alone."""
        self._cache = cache
        self._intra = intra
        self._start = start
        self._depth = depth
        self._clock = clock
        self._can_begin = can_begin
        self._rank = {layer: rank for rank, layer in enumerate(cache.numbers.layers)}
        self._moving: list[ExpertKey] = []
        self._called_s: float | None = None
        self._free_s = 0.0  # when the link will have moved what was begun
        self._period_us: float | None = None

    def prefetch(self, prediction: Prediction, protect: Placement) -> None:
        self._note_period()
        layer = protect.layer
        fetch_us = self._intra.fetch_us(layer)
        period_us = self._period_us or fetch_us
        busy_us = self._busy_us(fetch_us)
        if busy_us >= period_us:
            return
        room = ceil((period_us - busy_us) / fetch_us)
        candidates = self._candidates(prediction, layer, period_us, period_us)
        chosen, price_us = choose(candidates, busy_us, fetch_us, room)
        self._intra.link_price_us += PRICE_WEIGHT * (price_us - self._intra.link_price_us)
        if chosen:
            self._begin([candidate.key for candidate in chosen], protect)

    def saved_us(self, layer: int) -> float:
        """Of the layer's time, by a prefetched expert that is used and has arrived."""
        return self._intra.fetch_us(layer)

    def _begin(self, keys: Sequence[ExpertKey], protect: Placement) -> None:
        loads = self._cache.prefetch(keys, protect)
        if loads:
            now_s = self._called_s or 0.0
            fetch_s = self._intra.fetch_us(protect.layer) / 1e6
            self._free_s = max(now_s, self._free_s) + len(loads) * fetch_s
            self._moving += [load.key for load in loads]
            self._start(loads)

    def _busy_us(self, fetch_us: float) -> float:
        """Until what was begun has arrived, as far as that can be told.

        Demands go before it: by the clock it may be long done and yet have hardly begun. But one
        after the other they arrive, so all but the first have their whole way to go.
        """
        loading = ExpertState.LOADING
        self._moving = [key for key in self._moving if self._cache.state(key) is loading]
        if not self._moving or self._called_s is None:
            return 0.0
        by_clock_us = (self._free_s - self._called_s) * 1e6
        return max(by_clock_us, (len(self._moving) - 1) * fetch_us)

    def _note_period(self) -> None:
        """Learns the time from one layer to the next. A pause between requests is no such time:
        one call counts for at most twice what is known."""
        now_s = self._clock()
        if self._called_s is not None:
            took_us = (now_s - self._called_s) * 1e6
            known_us = self._period_us or took_us
            step_us = min(took_us, 2 * known_us) - known_us
            self._period_us = known_us + PERIOD_WEIGHT * step_us
        self._called_s = now_s

    def _candidates(
        self, prediction: Prediction, layer: int, next_us: float, period_us: float
    ) -> list[list[Candidate]]:
        """By predicted layer: what is absent, likeliest first, as far as it gains anything.

        next_us: until the next layer. period_us: from there from one to the next.
        """
        most, count = self._depth(layer), len(self._rank)
        laters, slacks_us, chances = [], [], []
        for later, probabilities in prediction.probabilities.items():
            distance = (self._rank[later] - self._rank[layer]) % count or count
            if distance <= most:
                laters.append(later)
                slacks_us.append(next_us + (distance - 1) * period_us)
                chances.append(probabilities.numpy())
        if not laters:
            return []
        absent = self._cache.which_absent(self._cache.numbers.of_layers(laters))
        sizes = [len(each) for each in chances]
        found = []
        for entry in _native.likely_absent(np.concatenate(chances), absent, sizes):
            likely = Likely(*entry)
            place = likely.place
            candidates = self._gaining(laters[place], sizes[place], likely, slacks_us[place])
            if candidates:
                found.append(candidates)
        return found

    def _gaining(
        self, layer: int, num_experts: int, likely: Likely, slack_us: float
    ) -> list[Candidate]:
        """The likeliest experts, as many as will be wanted, stand for the layer to come."""
        in_source = self._can_begin(self._cache.numbers.of(layer, likely.experts)).tolist()
        at_random, num_wanted = likely.total / num_experts, max(1, round(likely.total))
        rows = self._intra.rows_per_expert
        found: list[Candidate] = []
        for expert, chance, is_there in zip(likely.experts, likely.chances, in_source, strict=True):
            if not is_there:
                continue
            # As if the likelier ones had been brought; beyond the wanted, as if it took the place
            # of one that is there.
            absent = max(1, likely.num_absent - len(found))
            there = num_wanted - absent
            without_us = self._intra.layer_us(layer, there, absent, rows)
            with_us = self._intra.layer_us(layer, there + 1, absent - 1, rows)
            gain_us = (chance - at_random) * (without_us - with_us)
            if gain_us <= 0:
                break
            found.append(Candidate(ExpertKey(layer, expert), gain_us, chance, slack_us))
        return found


def choose(
    candidates: Sequence[Sequence[Candidate]], busy_us: float, fetch_us: float, room: int
) -> tuple[list[Candidate], float]:
    """At most `room` candidates, in the order in which they shall move, and the link's price.

    candidates: by layer, of falling gain. busy_us: until the link is free. One after the other, the
    head of a layer that nets most when it moves next; nothing that nets nothing. The price is what
    the last one nets if the room is full: so much would be lost if the link did something else.
    """
    heads = [0] * len(candidates)
    chosen: list[Candidate] = []
    price_us = 0.0
    while len(chosen) < room:
        arrives_us = busy_us + (len(chosen) + 1) * fetch_us
        best, best_us = -1, 0.0
        for index, of_layer in enumerate(candidates):
            if heads[index] < len(of_layer):
                net_us = of_layer[heads[index]].net_us(arrives_us)
                if net_us > best_us:
                    best, best_us = index, net_us
        if best < 0:
            return chosen, 0.0
        chosen.append(candidates[best][heads[best]])
        heads[best] += 1
        price_us = best_us
    return chosen, price_us
