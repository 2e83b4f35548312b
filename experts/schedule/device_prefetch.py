"""Between layers, device over host: what to copy while the link has nothing else to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil, inf

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.expert_cache import ExpertCache, Load
from moeserve.core import ExpertKey, Placement
from moeserve.experts.schedule.inter_layer import (
    PERIOD_WEIGHT,
    PRICE_WEIGHT,
    Candidate,
    ImpactPrefetch,
    WhichBegin,
    whatever,
)
from moeserve.experts.schedule.intra_layer import SimulatedPlacement
from moeserve.predictors.base import Prediction

Values = NDArray[np.float64]
#: of the uses to come that a policy expects, how many are taken to find the expert still there
#: (docs/log.md: a quarter to a half do equally well)
KEPT = 0.25


class DevicePrefetch(ImpactPrefetch):
    """`ImpactPrefetch` where a miss needs no fetch, for the CPU can run the expert.

    A copy pays twice: at the next use, as far as one is predicted and it arrives in time, and by
    the uses to come while the expert keeps its slot. So an expert counts with

        gain at the next use - what it is late for that + KEPT * uses to come * time saved by a use

    and the best of all absent experts, predicted or not, is copied if that is more than the uses to
    come of the expert that would lose its slot. With a policy that does not say how often experts
    will be used, what is left of the link goes to those that the CPU has just run.

    The link is filled until the next call: that is, for the time that the layer takes as placed,
    and what lies between two layers. It says itself for how long it is busy.
    """

    def __init__(
        self,
        cache: ExpertCache,
        intra: SimulatedPlacement,
        start: Callable[[tuple[Load, ...]], None],
        depth: Callable[[int], int],
        clock: Callable[[], float] = time.perf_counter,
        can_begin: WhichBegin = whatever,
        *,
        left_us: Callable[[], float],
    ) -> None:
        """left_us: until the link has moved all that it was given, demands, too. Others: as
        `ImpactPrefetch` has them."""
        super().__init__(cache, intra, start, depth, clock, can_begin)
        self._left_us = left_us
        self._placed_us = 0.0  # of the layer of the last call
        self._between_us: float | None = None
        self._given_up_us = 0.0  # of the slot that costs least
        intra.kept_us = self._net_kept_us

    def prefetch(self, prediction: Prediction, protect: Placement) -> None:
        self._note_period()
        fetch_us = self._intra.fetch_us(protect.layer)
        next_us = self._placed_us + (self._between_us or 0.0) or fetch_us
        busy_us = self._left_us()
        if busy_us >= next_us:
            return
        room = ceil((next_us - busy_us) / fetch_us)
        period_us = self._period_us or fetch_us
        candidates = self._candidates(prediction, protect.layer, next_us, period_us)
        chosen, price_us = self._choose(candidates, busy_us, fetch_us, room, protect)
        self._intra.link_price_us += PRICE_WEIGHT * (price_us - self._intra.link_price_us)
        if chosen:
            self._begin(chosen, protect)
        if len(chosen) < room:
            numbers = self._cache.numbers.of(protect.layer, protect.on_cpu)
            there = numbers[self._cache.which_absent(numbers) & self._can_begin(numbers)]
            keys = [self._cache.numbers.key(n) for n in there[: room - len(chosen)].tolist()]
            self._begin(keys, protect)

    def _note_period(self) -> None:
        """Learns, too, what of it lies between two layers, whose own times are known."""
        called_s, known_us = self._called_s, self._period_us
        super()._note_period()
        if called_s is not None and self._called_s is not None:
            took_us = (self._called_s - called_s) * 1e6
            took_us = min(took_us, 2 * (known_us or took_us))
            between_us = max(0.0, took_us - self._placed_us)
            known_us = between_us if self._between_us is None else self._between_us
            self._between_us = known_us + PERIOD_WEIGHT * (between_us - known_us)
        self._placed_us = self._intra.placed_us

    def _choose(
        self,
        candidates: Sequence[Sequence[Candidate]],
        busy_us: float,
        fetch_us: float,
        room: int,
        protect: Placement,
    ) -> tuple[list[ExpertKey], float]:
        """At most `room` experts, in the order in which they shall move, and the link's price: what
        the last one nets if the room is full."""
        cache, numbers = self._cache, self._cache.numbers
        saved_us = KEPT * self.saved_us(protect.layer)
        victims = cache.next_victims(room, protect)
        lost_us = [0.0] * cache.num_free + (saved_us * self._uses(victims)).tolist()
        self._given_up_us = lost_us[0] if lost_us else inf
        absent = cache.absent()
        absent = absent[self._can_begin(absent)]
        kept_us = np.full(numbers.total, -inf)
        kept_us[absent] = saved_us * cache.policy.uses_to_come(absent)
        predicted = [(numbers.number(c.key), c) for of_layer in candidates for c in of_layer]
        chosen: list[ExpertKey] = []
        price_us = 0.0
        for given_up_us in lost_us[:room]:
            arrives_us = busy_us + (len(chosen) + 1) * fetch_us
            number, value_us = _best(kept_us, predicted, arrives_us)
            if value_us <= given_up_us:
                break
            chosen.append(numbers.key(number))
            kept_us[number] = -inf
            price_us = value_us - given_up_us
        return chosen, price_us if len(chosen) == room else 0.0

    def _net_kept_us(self, layer: int, experts: Sequence[int]) -> list[float]:
        """For the intra-layer scheduler."""
        uses = self._cache.policy.uses_to_come(self._cache.numbers.of(layer, experts))
        net_us = KEPT * self.saved_us(layer) * uses - self._given_up_us
        found: list[float] = np.maximum(net_us, 0.0).tolist()
        return found

    def _uses(self, experts: list[int]) -> Values:
        return self._cache.policy.uses_to_come(np.array(experts, np.int64))

    def saved_us(self, layer: int) -> float:
        """By a use on the device instead of the CPU."""
        costs, rows = self._intra.costs[layer], self._intra.rows_per_expert
        return max(0.0, costs.cpu_us(rows) - costs.device_us(rows))


def _best(
    kept_us: Values, predicted: Sequence[tuple[int, Candidate]], arrives_us: float
) -> tuple[int, float]:
    """The number of the expert that is worth most, and how much. kept_us: [N], by the uses to come;
    -inf for those that are out of the question."""
    best = int(kept_us.argmax())
    best_us = float(kept_us[best])
    for number, candidate in predicted:
        value_us = kept_us[number] + max(0.0, candidate.net_us(arrives_us))
        if value_us > best_us:
            best, best_us = number, float(value_us)
    return best, best_us
