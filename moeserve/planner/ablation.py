"""Decode time of a routing trace on simulated timelines: what each part of the machinery brings.

The real cache, policies, placement and prefetching run; only computing and copying are replaced by
the times of a cost model. A layer lasts as long as `timeline` says, its shared experts running on
the device beside the CPU; between the experts of two layers lies a fixed time on the device.
Prefetches move whenever no demand does, also beside the time between. Not modelled: that copies and
the CPU share the memory's bandwidth, and the time of the bookkeeping itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.expert_cache import ExpertCache, Residency, Tier
from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.cache.policies.base import Policy
from moeserve.cache.policies.lru import LruPolicy
from moeserve.cache.policies.registry import build_policy
from moeserve.core import ExpertKey, LayerUse, Placement
from moeserve.experts.device_supply import FittingPlacement
from moeserve.experts.prefetch import WatchedPrefetch
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.intra_layer import TimelinePlacement
from moeserve.planner.simulate.link import SimulatedLink
from moeserve.predictors.base import NOTHING, Prediction

Ids = NDArray[np.int64]
#: most slots for what comes and goes beside experts that stay
SPARE_SLOTS = 32


@dataclass(frozen=True)
class Strategy:
    """Which parts run. Without `cache` the most popular experts stay on the device; without
    `scheduling` experts run where they are; without `prefetch` nothing is predicted."""

    name: str
    scheduling: bool = False
    prefetch: bool = False
    cache: bool = False


STRATEGIES = (
    Strategy("static"),
    Strategy("scheduling", scheduling=True),
    Strategy("prefetch", prefetch=True),
    Strategy("cache", cache=True),
    Strategy("all", scheduling=True, prefetch=True, cache=True),
)


@dataclass(frozen=True)
class Setting:
    """Of one simulation. costs: of every layer's experts. between_us: attention and all else of a
    layer. num_slots: on the device. popular: experts by falling use, from other tokens than those
    that are simulated. policy: a name. depth: of predictions that are followed."""

    costs: CostModel
    between_us: float
    num_experts: int
    num_layers: int
    num_slots: int
    popular: Sequence[ExpertKey]
    policy: str = "score"
    depth: int = 1


@dataclass(frozen=True)
class Outcome:
    """token_us: mean time of a decode step. hit_rate: wanted experts that were on the device.
    useful_prefetches, link_busy: shares of the prefetches and of the time."""

    token_us: float
    hit_rate: float
    prefetches_per_token: float
    useful_prefetches: float
    link_busy: float


def popularity(ids: Ids, num_experts: int) -> list[ExpertKey]:
    """Experts of a trace [T, L, K] by falling number of uses."""
    num_layers = ids.shape[1]
    counts = np.zeros((num_layers, num_experts), np.int64)
    for layer in range(num_layers):
        counts[layer] = np.bincount(ids[:, layer].ravel(), minlength=num_experts)
    order = np.argsort(-counts.ravel(), kind="stable")
    return [ExpertKey(*divmod(int(number), num_experts)) for number in order]


def all_resident_us(setting: Setting, experts_per_token: int) -> float:
    """A decode step with every expert on the device: no strategy is faster."""
    costs = setting.costs
    layer_us = costs.device_begins_us + experts_per_token * costs.device_us(1)
    return setting.num_layers * (layer_us + setting.between_us)


class PinnedPolicy(LruPolicy):
    """Popular experts keep their slots whatever happens; the others take turns."""

    def __init__(self, numbers: ExpertNumbers, pinned: Sequence[ExpertKey]) -> None:
        super().__init__(numbers)
        self._pinned = np.array([numbers.number(key) for key in pinned], np.int64)

    def victims(
        self, candidates: Numbers, count: int, incoming: Numbers | None = None
    ) -> list[int]:
        return super().victims(np.setdiff1d(candidates, self._pinned), count, incoming)


class DecodeSimulation:
    """One strategy on one setting; call `run` once."""

    def __init__(self, strategy: Strategy, setting: Setting) -> None:
        self._strategy = strategy
        self._setting = setting
        num_experts = dict.fromkeys(range(setting.num_layers), setting.num_experts)
        self._cache = self._filled_cache(num_experts)
        costs = setting.costs
        self._link = SimulatedLink(self._cache, costs.transfer_us(costs.expert_bytes))
        timeline = TimelinePlacement(dict.fromkeys(num_experts, costs), self._link.loading)
        self._placement = FittingPlacement(timeline, self._cache)
        self._now_us = 0.0
        self._prefetch = WatchedPrefetch(
            self._cache,
            timeline,
            self._link.begin,
            lambda: self._link.busy_us / 1e6,
            setting.depth,
            lambda: self._now_us / 1e6,
            left_us=self._link.left_us,
        )

    def _filled_cache(self, num_experts: Mapping[int, int]) -> ExpertCache:
        """Slots full of the most popular experts; where these stay, but for a few to work with."""
        setting, strategy = self._setting, self._strategy
        spare = 0
        if not strategy.cache and (strategy.scheduling or strategy.prefetch):
            spare = min(setting.num_slots // 4, SPARE_SLOTS)
        popular = list(setting.popular[: setting.num_slots - spare])
        policy: Policy
        if strategy.cache:
            policy = build_policy(setting.policy, num_experts)
        else:
            policy = PinnedPolicy(ExpertNumbers(num_experts), popular)
        cache = ExpertCache(Tier.DEVICE, num_experts, setting.num_slots, policy)
        for layer in num_experts:
            wanted = tuple(key.expert for key in popular if key.layer == layer)
            with cache.acquire(Placement(layer, fetch_first=wanted)) as slots:
                for load in slots.loads:
                    cache.complete(load.key)
        return cache

    def run(self, ids: Ids, predictions: Sequence[Sequence[Prediction]]) -> Outcome:
        """ids: [T, L, K]; one token a step. predictions: by token and layer."""
        num_tokens, num_layers, _ = ids.shape
        hits = 0
        for token in range(num_tokens):
            for layer in range(num_layers):
                hits += self._layer(layer, ids[token, layer], predictions[token][layer])
        counters = self._cache.counters
        begun = int(counters.prefetches_begun.sum())
        return Outcome(
            token_us=self._now_us / num_tokens,
            hit_rate=hits / ids.size,
            prefetches_per_token=begun / num_tokens,
            useful_prefetches=int(counters.prefetches_useful.sum()) / max(begun, 1),
            link_busy=self._link.busy_us / self._now_us,
        )

    def _layer(self, layer: int, wanted: Ids, prediction: Prediction) -> int:
        strategy, costs = self._strategy, self._setting.costs
        rows = np.bincount(wanted, minlength=self._setting.num_experts).astype(np.int32)
        use = LayerUse(layer, rows, rows / np.float32(wanted.size))
        self._link.advance(self._now_us)
        residency = self._cache.residency(layer)
        if strategy.scheduling:
            placement = self._placement.place(use, residency)
        else:
            placement = stay(use, residency)
        self._cache.observe(use)
        with self._cache.acquire(placement):
            fetched = [ExpertKey(layer, e) for e in placement.fetch_first]
            arrivals = [at_us - self._now_us for at_us in self._link.demand(fetched)]
            if strategy.prefetch or strategy.cache:
                self._prefetch.prefetch(prediction if strategy.prefetch else NOTHING, placement)
            took_us = layer_us(costs, rows, placement, arrivals)
        if took_us > (arrivals[-1] if arrivals else 0.0):
            self._link.advance(self._now_us + took_us)
        self._now_us += took_us + self._setting.between_us
        return len(residency.ready.intersection(wanted.tolist()))


def stay(use: LayerUse, residency: Residency) -> Placement:
    """Resident experts on the device, the others on the CPU: no scheduling."""
    active = np.flatnonzero(use.rows).tolist()
    return Placement(
        use.layer,
        on_device=tuple(e for e in active if e in residency.ready),
        on_cpu=tuple(e for e in active if e not in residency.ready),
    )


def layer_us(
    costs: CostModel, rows: NDArray[np.int32], placement: Placement, arrivals: Sequence[float]
) -> float:
    """As `timeline.makespan_us`, with arrivals that may differ."""
    cpu_us, device_us = 0.0, costs.device_least_us
    if placement.on_cpu:
        cpu_us = costs.cpu_start_us + sum(costs.cpu[int(rows[e])] for e in placement.on_cpu)
    if placement.on_device or placement.fetch_first:
        device_us = costs.device_begins_us
        device_us += sum(costs.device_us(int(rows[e])) for e in placement.on_device)
    for expert, arrived_us in zip(placement.fetch_first, arrivals, strict=True):
        device_us = max(device_us, arrived_us) + costs.device_us(int(rows[expert]))
    return max(cpu_us, device_us)
