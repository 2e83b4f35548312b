"""Replays recorded routing through policies: how often an expert stood in a slot when wanted.

Nothing is computed and nothing moves; an expert that is missed is there at once. `TierReplay` keeps
of the cache no more than which experts it holds, so that many can be replayed side by side;
`through_cache` drives `ExpertCache` itself, and a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moeserve.cache import expert_cache
from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.cache.policies.base import Policy
from moeserve.cache.routing_trace import RoutingTrace, Step
from moeserve.core import ExpertKey, LayerUse, Placement

#: after a layer of a step, given its tokens: chances of later layers' experts, [E] by layer
Foresight = Callable[[int, Step], Mapping[int, NDArray[np.float32]]]


@dataclass(frozen=True)
class Rules:
    """How the slots of a tier may be used.

    share: slots as a part of all experts. per_layer: every layer has the same share of its own,
    instead of one pool. bypass: a missed expert may be used without being taken in, where the
    policy holds others for worth more. keep_used: experts that a step uses keep their slots while
    it does; only an oracle goes without.
    """

    share: float
    per_layer: bool = False
    bypass: bool = False
    keep_used: bool = True


@dataclass(eq=False)
class TierReplay:
    """What one tier holds, and how often it held what was wanted, per step."""

    numbers: ExpertNumbers
    rules: Rules
    hits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        layers = len(self.numbers.layers)
        slots = [max(1, round(self.rules.share * size)) for size in self.numbers.sizes]
        self.num_slots = sum(slots)
        self._free = np.array(slots if self.rules.per_layer else [sum(slots)] * layers)
        self._held = np.zeros(self.numbers.total, np.bool_)

    def ask(self, layer: int, wanted: Numbers, policy: Policy) -> int:
        """A layer of a step wants these experts: how many are there. The others come in."""
        present = self._held[wanted]
        absent = wanted[~present]
        if len(absent):
            self._take_in(layer, wanted, absent, policy)
        return len(wanted) - len(absent)

    def _take_in(self, layer: int, wanted: Numbers, absent: Numbers, policy: Policy) -> None:
        rank = self.numbers.rank_of[layer]
        short = len(absent) - int(self._free[rank])
        victims: list[int] = []
        if short > 0:
            candidates = self._candidates(layer, wanted)
            if self.rules.bypass:
                absent = policy.by_preference(absent)
                victims = policy.victims(candidates, short, absent[-short:])
            else:
                victims = policy.victims(candidates, short)
            absent = absent[: len(absent) - short + len(victims)]
        for number in victims:
            self._held[number] = False
            policy.evicted(number)
        self._held[absent] = True
        for number in absent.tolist():
            policy.loaded(number)
        self._free[rank if self.rules.per_layer else slice(None)] -= len(absent) - len(victims)

    def _candidates(self, layer: int, wanted: Numbers) -> Numbers:
        """What may lose its slot to this layer's needs."""
        used = wanted[self._held[wanted]] if self.rules.keep_used else wanted[:0]
        self._held[used] = False
        span = self.numbers.span_of[layer] if self.rules.per_layer else slice(0, None)
        candidates: Numbers = np.flatnonzero(self._held[span])
        candidates += span.start
        self._held[used] = True
        return candidates


@dataclass(eq=False)
class Contender:
    """A policy and the tiers it rules: several where its worth does not depend on what they hold.

    foresight: what tells the policy of layers to come, if anything does.
    """

    name: str
    policy: Policy
    tiers: Sequence[TierReplay]
    foresight: Foresight | None = None

    def remember(self, uses: Sequence[tuple[LayerUse, Numbers]], step: Step) -> None:
        """A step that the policy learns from, before the replay: its tiers stay as they are."""
        for use, wanted in uses:
            self.policy.observed(use)
            self._used(use.layer, wanted, step)

    def step(self, uses: Sequence[tuple[LayerUse, Numbers]], step: Step) -> None:
        """A step of the replay."""
        hits = [0] * len(self.tiers)
        for use, wanted in uses:
            self.policy.observed(use)
            for place, tier in enumerate(self.tiers):
                hits[place] += tier.ask(use.layer, wanted, self.policy)
            self._used(use.layer, wanted, step)
        for tier, found in zip(self.tiers, hits, strict=True):
            tier.hits.append(found)

    def _used(self, layer: int, wanted: Numbers, step: Step) -> None:
        start = self.tiers[0].numbers.start_of[layer]
        self.policy.used(layer, (wanted - start).tolist())
        if self.foresight is not None:
            for ahead, chances in self.foresight(layer, step).items():
                self.policy.expected(ahead, chances)


def uses_of(trace: RoutingTrace, step: Step) -> list[LayerUse]:
    """What a step asks of every layer."""
    ids = trace.ids[step].transpose(1, 0, 2).reshape(len(trace.layers), -1)  # [L, T * K]
    weights = trace.weights[step].transpose(1, 0, 2).reshape(len(trace.layers), -1)
    size = trace.num_experts
    uses = []
    for layer, chosen, weight in zip(trace.layers, ids, weights, strict=True):
        rows = np.bincount(chosen, minlength=size).astype(np.int32)
        total = np.bincount(chosen, weight, minlength=size).astype(np.float32)
        uses.append(LayerUse(layer, rows, total))
    return uses


def replay(
    trace: RoutingTrace, steps: Sequence[Step], contenders: Sequence[Contender]
) -> NDArray[np.int64]:
    """Runs all contenders through the steps; returns the uses of experts, by step."""
    numbers = ExpertNumbers(trace.experts_per_layer)
    asked = []
    for step in steps:
        uses = numbered_uses(trace, step, numbers)
        asked.append(sum(len(wanted) for _, wanted in uses))
        for contender in contenders:
            contender.step(uses, step)
    return np.array(asked, np.int64)


def numbered_uses(
    trace: RoutingTrace, step: Step, numbers: ExpertNumbers
) -> list[tuple[LayerUse, Numbers]]:
    """What a step asks of every layer, and the numbers of the experts that it wants."""
    return [
        (use, np.flatnonzero(use.rows) + numbers.start_of[use.layer])
        for use in uses_of(trace, step)
    ]


def all_uses(trace: RoutingTrace, steps: Sequence[Step]) -> list[Numbers]:
    """The experts of every use of a layer, in order, for `BeladyPolicy`."""
    numbers = ExpertNumbers(trace.experts_per_layer)
    starts = np.array([numbers.start_of[layer] for layer in trace.layers])
    return [
        np.unique(row)
        for step in steps
        for row in (trace.ids[step] + starts[:, None]).transpose(1, 0, 2).reshape(len(starts), -1)
    ]


def through_cache(
    trace: RoutingTrace, steps: Sequence[Step], policy: Policy, rules: Rules
) -> list[int]:
    """Hits by step of a real `ExpertCache` in the host tier, slots shared by all layers."""
    assert not rules.per_layer, "an ExpertCache shares its slots"
    numbers = ExpertNumbers(trace.experts_per_layer)
    num_slots = TierReplay(numbers, rules).num_slots
    tier = expert_cache.Tier.HOST
    cache = expert_cache.ExpertCache(tier, trace.experts_per_layer, num_slots, policy)
    return [_cached_step(cache, trace, step) for step in steps]


def _cached_step(cache: expert_cache.ExpertCache, trace: RoutingTrace, step: Step) -> int:
    hits = 0
    for use in uses_of(trace, step):
        cache.observe(use)
        ready = cache.residency(use.layer).ready
        wanted = np.flatnonzero(use.rows).tolist()
        here = tuple(e for e in wanted if e in ready)
        absent = tuple(e for e in wanted if e not in ready)
        hits += len(here)
        with cache.acquire(Placement(use.layer, on_cpu=here, fetch_first=absent)) as slots:
            for load in slots.loads:
                cache.complete(ExpertKey(*load.key))
    return hits
