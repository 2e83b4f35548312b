"""Decodes a trace on real MoE layers over an emulated device, one strategy at a time."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from emulated.cases import Case
from moeserve.cache.expert_cache import ExpertCache, Residency, Tier
from moeserve.cache.numbering import ExpertNumbers
from moeserve.cache.policies.base import Policy
from moeserve.cache.policies.registry import build_policy
from moeserve.config import ExpertConfig
from moeserve.core import ExpertKey, ExpertSpec, LayerUse, Placement, Routing
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.experts.device.clock import ModelledClock
from moeserve.experts.device_supply import DeviceSupply, FittingPlacement
from moeserve.experts.device_tier import emulated_device
from moeserve.experts.layer import MoELayer, build_moe_layer
from moeserve.experts.layer_use import count_use
from moeserve.experts.prefetch import WatchedPrefetch
from moeserve.experts.replay import RoutingReplay, force_routing
from moeserve.experts.router import RouterSpec, RouterWeights
from moeserve.experts.runtime import ExpertRuntime
from moeserve.experts.schedule.inter_layer import InterLayerScheduler, ResidentPrefetch
from moeserve.experts.schedule.intra_layer import IntraLayerScheduler, TimelinePlacement
from moeserve.planner.ablation import SPARE_SLOTS, PinnedPolicy, Strategy, popularity, stay
from moeserve.predictors.base import Predictor
from moeserve.predictors.none import NonePredictor
from moeserve.predictors.registry import make_predictor

#: of the experts that are really computed: times are those of the real shape
HIDDEN, INNER = 64, 32
DEPTH = 3


@dataclass(frozen=True)
class Learnt:
    """What has seen the requests before: everybody's knowledge at the start of a run."""

    popular: list[ExpertKey]
    policy: Policy
    predictor: Predictor


@dataclass(frozen=True)
class Outcome:
    """Of the emulated time. busy: shares of it. hit_rate: wanted experts that were on the device.
    checksum: of all that the layers gave, bit by bit."""

    token_us: float
    hit_rate: float
    prefetches_per_token: float
    useful_prefetches: float
    link_busy: float
    device_busy: float
    checksum: int


class StayPlacement(IntraLayerScheduler):
    """Experts run where they are: no scheduling."""

    def place(self, use: LayerUse, residency: Residency) -> Placement:
        return stay(use, residency)


def learn(case: Case, policy_name: str, predictor_name: str) -> Learnt:
    """The tokens of `case.learn`, seen one by one."""
    numbers = case.trace.experts_per_layer
    policy = build_policy(policy_name, numbers)
    predictor = make_predictor(predictor_name, numbers, DEPTH)
    x = torch.empty(1, 0)
    for token in case.learn.tolist():
        for rank, layer in enumerate(case.trace.layers):
            routing = Routing(
                torch.from_numpy(case.trace.ids[token : token + 1, rank]),
                torch.from_numpy(case.trace.weights[token : token + 1, rank]),
            )
            predictor.predict(layer, x, routing)
            use = count_use(layer, routing, case.shape.num_experts)
            policy.observed(use)
            policy.used(layer, np.flatnonzero(use.rows).tolist())
    by_rank = popularity(case.trace.ids[case.learn], case.shape.num_experts)
    popular = [ExpertKey(case.trace.layers[key.layer], key.expert) for key in by_rank]
    return Learnt(popular, policy, predictor)


class Decoder:
    """The layers of one trace's model, with random weights. `run` may be called again and again."""

    def __init__(self, case: Case, native: NativeRuntime) -> None:
        self._case = case
        self._native = native
        self._spec = ExpertSpec(
            num_experts=case.shape.num_experts, hidden_size=HIDDEN, intermediate_size=INNER
        )
        generator = torch.Generator().manual_seed(0)
        self._experts = {layer: self._random(generator) for layer in case.trace.layers}

    @property
    def num_experts(self) -> int:
        """In all layers."""
        return len(self._experts) * self._spec.num_experts

    def run(self, strategy: Strategy, num_slots: int, learnt: Learnt) -> Outcome:
        """From slots full of the most popular experts; where these stay, but for a few to work
        with."""
        spare = 0
        if not strategy.cache and (strategy.scheduling or strategy.prefetch):
            spare = min(num_slots // 4, SPARE_SLOTS)
        popular = learnt.popular[: num_slots - spare]
        cache = self._cache(strategy, num_slots, learnt, popular)
        costs = dict.fromkeys(self._experts, self._case.costs)
        clock = ModelledClock(self._case.rest_us)
        device = emulated_device(clock, self._experts, costs, num_slots)
        supply = DeviceSupply(cache, device)
        timeline = TimelinePlacement(costs, device.loading_us)
        inter: InterLayerScheduler = ResidentPrefetch()
        if strategy.prefetch or strategy.cache:
            inter = WatchedPrefetch(
                cache,
                timeline,
                supply.prefetch,
                lambda: device.link.stats.busy_s,
                DEPTH,
                lambda: clock.now_us() / 1e6,
            )
        runtime = ExpertRuntime(
            config=ExpertConfig(),
            device=torch.device("cpu"),
            backend=NativeBackend(self._native),
            native=self._native,
            cache=cache,
            supply=supply,
            intra=FittingPlacement(timeline, cache) if strategy.scheduling else StayPlacement(),
            inter=inter,
            predictor=copy.deepcopy(learnt.predictor) if strategy.prefetch else NonePredictor(),
            count_use=count_use,
            notes={},
        )
        for layer in self._experts:
            wanted = tuple(key.expert for key in popular if key.layer == layer)
            with supply.acquire(Placement(layer, fetch_first=wanted)):
                clock.wait_until(clock.now_us() + (1 + len(wanted)) * timeline.fetch_us(layer))
        return self._decode(self._layers(runtime), supply)

    def _cache(
        self, strategy: Strategy, num_slots: int, learnt: Learnt, popular: Sequence[ExpertKey]
    ) -> ExpertCache:
        num_experts = self._case.trace.experts_per_layer
        policy: Policy = PinnedPolicy(ExpertNumbers(num_experts), popular)
        if strategy.cache:
            policy = copy.deepcopy(learnt.policy)
        return ExpertCache(Tier.DEVICE, num_experts, num_slots, policy)

    def _decode(self, layers: Sequence[MoELayer], supply: DeviceSupply) -> Outcome:
        case, device, counters = self._case, supply.device, supply.cache.counters
        ids, weights = case.trace.ids[case.test], case.trace.weights[case.test]
        trace = replace(case.trace, ids=ids, weights=weights, requests=())
        force_routing(layers, RoutingReplay(trace), trace)
        before = counters.totals()
        begun_us, link_s, device_us = (
            device.clock.now_us(),
            device.link.stats.busy_s,
            device.busy_us,
        )
        generator = torch.Generator().manual_seed(1)
        checksum = 0
        for step in range(len(case.test)):
            x = torch.randn(1, HIDDEN, generator=generator)
            for layer in layers:
                x = x + layer.forward(x, step)
            checksum = zlib.crc32(x.numpy().tobytes(), checksum)
        supply.check_integrity()
        took_us = device.clock.now_us() - begun_us
        counts = {name: count - before[name] for name, count in counters.totals().items()}
        begun = counts["prefetches_begun"]
        return Outcome(
            token_us=took_us / len(case.test),
            hit_rate=counts["hits"] / trace.ids.size,
            prefetches_per_token=begun / len(case.test),
            useful_prefetches=counts["prefetches_useful"] / max(1, begun),
            link_busy=(device.link.stats.busy_s - link_s) * 1e6 / took_us,
            device_busy=(device.busy_us - device_us) / took_us,
            checksum=checksum,
        )

    def _layers(self, runtime: ExpertRuntime) -> list[MoELayer]:
        top_k = self._case.trace.ids.shape[2]
        router = RouterSpec(
            num_experts=self._spec.num_experts, top_k=top_k, hidden_size=HIDDEN, normalize=True
        )
        gate = RouterWeights(torch.zeros(self._spec.num_experts, HIDDEN))
        return [
            build_moe_layer(layer, router, self._spec, gate, experts, runtime)
            for layer, experts in self._experts.items()
        ]

    def _random(self, generator: torch.Generator) -> PackedExperts:
        packed = PackedExperts(self._native.handle, self._spec, PackFormat("float32"))

        def normal(rows: int, cols: int) -> Tensor:
            return torch.randn(rows, cols, generator=generator) / cols**0.5

        for expert in range(self._spec.num_experts):
            packed.put_gate_up(expert, torch.arange(2 * INNER), normal(2 * INNER, HIDDEN))
            packed.put_down(expert, torch.arange(HIDDEN), normal(HIDDEN, INNER))
        return packed
