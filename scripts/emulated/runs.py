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
from moeserve.experts.device_tier import emulated_device, prefetch_to_device
from moeserve.experts.layer import MoELayer, build_moe_layer
from moeserve.experts.layer_use import count_use
from moeserve.experts.replay import RoutingReplay
from moeserve.experts.router import RouterSpec, RouterWeights
from moeserve.experts.runtime import ExpertRuntime
from moeserve.experts.schedule.inter_layer import InterLayerScheduler, ResidentPrefetch
from moeserve.experts.schedule.intra_layer import IntraLayerScheduler, TimelinePlacement
from moeserve.planner.ablation import SPARE_SLOTS, PinnedPolicy, Strategy, stay
from moeserve.predictors.base import Predictor
from moeserve.predictors.none import NonePredictor
from moeserve.predictors.registry import make_predictor

#: of the experts that are really computed: times are those of the real shape
HIDDEN, INNER = 64, 32
DEPTH = 6


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

    num_tokens: int
    token_us: float
    hit_rate: float
    prefetches_per_token: float
    useful_prefetches: float
    link_busy: float
    device_busy: float
    checksum: int


class TracedRouter:
    """A router whose own work is not done: its time is in the rest of a layer."""

    def __init__(self, spec: RouterSpec, replay: RoutingReplay, rank: int) -> None:
        self.spec = spec
        self._replay = replay
        self._rank = rank

    def __call__(self, x: Tensor) -> Routing:
        return self._replay.routing(self._rank, len(x))


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
    popular = [ExpertKey(case.trace.layers[key.layer], key.expert) for key in case.popular]
    return Learnt(popular, policy, predictor)


class Run:
    """One strategy on its way through the tokens for the test."""

    def __init__(self, case: Case, layers: Sequence[MoELayer], supply: DeviceSupply) -> None:
        self._case = case
        self._layers = layers
        self._supply = supply
        ids, weights = case.trace.ids[case.test], case.trace.weights[case.test]
        trace = replace(case.trace, ids=ids, weights=weights, requests=())
        replay = RoutingReplay(trace)
        for rank, layer in enumerate(layers):
            layer.router = TracedRouter(layer.router.spec, replay, rank)
        self._counted_before = supply.cache.counters.totals()
        device = supply.device
        self._begun_us = device.clock.now_us()
        self._link_before_s = device.link.stats.busy_s
        self._device_before_us = device.busy_us
        self._generator = torch.Generator().manual_seed(1)
        self._checksum = 0
        self._num_done = 0

    def decode(self, num_tokens: int) -> None:
        """So many tokens more, as far as there are any."""
        end = min(self._num_done + num_tokens, len(self._case.test))
        for step in range(self._num_done, end):
            x = torch.randn(1, HIDDEN, generator=self._generator)
            for layer in self._layers:
                x = x + layer.forward(x, step)
            self._checksum = zlib.crc32(x.numpy().tobytes(), self._checksum)
        self._supply.check_integrity()
        self._num_done = end

    def outcome(self) -> Outcome:
        """Of all tokens so far."""
        device, counters = self._supply.device, self._supply.cache.counters
        num_tokens, (_, num_layers, top_k) = self._num_done, self._case.trace.ids.shape
        took_us = device.clock.now_us() - self._begun_us
        before = self._counted_before
        counts = {name: count - before[name] for name, count in counters.totals().items()}
        begun = counts["prefetches_begun"]
        return Outcome(
            num_tokens=num_tokens,
            token_us=took_us / num_tokens,
            hit_rate=counts["hits"] / (num_tokens * num_layers * top_k),
            prefetches_per_token=begun / num_tokens,
            useful_prefetches=counts["prefetches_useful"] / max(1, begun),
            link_busy=(device.link.stats.busy_s - self._link_before_s) * 1e6 / took_us,
            device_busy=(device.busy_us - self._device_before_us) / took_us,
            checksum=self._checksum,
        )


class Decoder:
    """The layers of one trace's model, with random weights, for any number of runs."""

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

    def begin(self, strategy: Strategy, num_slots: int, learnt: Learnt) -> Run:
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
            inter = prefetch_to_device(supply, timeline, DEPTH)
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
        return Run(self._case, self._layers(runtime), supply)

    def _cache(
        self, strategy: Strategy, num_slots: int, learnt: Learnt, popular: Sequence[ExpertKey]
    ) -> ExpertCache:
        num_experts = self._case.trace.experts_per_layer
        policy: Policy = PinnedPolicy(ExpertNumbers(num_experts), popular)
        if strategy.cache:
            policy = copy.deepcopy(learnt.policy)
        return ExpertCache(Tier.DEVICE, num_experts, num_slots, policy)

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
