"""An engine's side of a prefetching scheduler: a clock that the test sets, loads only noted."""

from __future__ import annotations

from moeserve.cache.expert_cache import ExpertCache, ExpertState, Load
from moeserve.core import ExpertKey
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.curve import Curve

LAYERS, EXPERTS = 4, 8
COSTS = CostModel(
    expert_bytes=1000,
    cpu=Curve([1, 2], [100.0, 110.0]),
    cpu_start_us=10.0,
    device=Curve([1], [5.0]),
    device_start_us=3.0,
    link=Curve([1000], [200.0]),
    disk=Curve([1000], [200.0]),
)


class PrefetchBench:
    def __init__(self, cache: ExpertCache) -> None:
        self.cache = cache
        self.now_us = 0.0
        self.begun: list[ExpertKey] = []

    def start(self, loads: tuple[Load, ...]) -> None:
        self.begun += [load.key for load in loads]

    def hold(self, *keys: tuple[int, int]) -> None:
        for load in self.cache.prefetch([ExpertKey(*key) for key in keys]):
            self.cache.complete(load.key)

    def arrive(self) -> None:
        for key in self.begun:
            if self.cache.state(key) is ExpertState.LOADING:
                self.cache.complete(key)
