"""Which policies are replayed on which steps with which slots, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moeserve.cache.numbering import ExpertNumbers
from moeserve.cache.policies.belady import BeladyPolicy
from moeserve.cache.policies.registry import build_policy
from moeserve.cache.replay import (
    Contender,
    Rules,
    TierReplay,
    all_uses,
    numbered_uses,
    replay,
)
from moeserve.cache.routing_trace import (
    Request,
    RoutingTrace,
    Step,
    chunks,
    load_trace,
    merged,
    one_by_one,
)
from moeserve.core import ConfigError, Routing
from moeserve.predictors.markov import MarkovPredictor

POLICIES = ("lru", "lfu", "mrs", "least_stale", "score", "score+markov", "belady")
PARTS = ("tune", "report", "all")
#: a pass through the layers has to end before its experts come again: that far ahead at most
MARKOV_DEPTH = 4


@dataclass(frozen=True)
class Job:
    """One replay of one trace.

    steps: "single" (a token per step), "streams:N" (N requests at once), "chunk:N" (N tokens of a
    request). part: "tune" takes every second request beginning with the first, "report" the others.
    num_tokens: about so many, in whole requests; None for all. history_tokens: of the other part,
    one by one, which policies have seen before while their slots stayed empty, as in a server that
    has been running.
    """

    path: Path
    steps: str
    shares: tuple[float, ...]
    policies: tuple[str, ...]
    part: str = "report"
    num_tokens: int | None = None
    history_tokens: int = 0
    num_experts: int | None = None

    @property
    def past(self) -> tuple[object, ...]:
        """What policies know when the replay begins follows from this."""
        return self.path, self.policies, self.part, self.history_tokens, self.num_experts


@dataclass(frozen=True)
class Figure:
    """A policy's hit rate in one setting. closed: the part of the gap from LRU to Belady's optimum
    in the same setting that it closes; None without both of these."""

    trace: str
    steps: str
    slots: str  # "shared" or "per layer"
    share: float
    policy: str
    hit_rate: float
    closed: float | None = None


@dataclass(frozen=True)
class Outcome:
    """groups: hit rates by kind of request, by (share, policy), slots shared."""

    num_tokens: int
    figures: list[Figure]
    groups: dict[str, dict[str, float]] = field(default_factory=dict)


def run_jobs(jobs: Sequence[Job]) -> list[Outcome]:
    """Jobs that differ in their steps and slots alone: what policies have seen before is learnt
    once and copied for each, as it takes longer than most replays. Raises MoeserveError for a trace
    that is none."""
    first = jobs[0]
    assert all(job.past == first.past for job in jobs), "each has a past of its own"
    trace = load_trace(first.path, first.num_experts)
    part = part_of(trace.requests, first.part)
    if not len(part):
        raise ConfigError(
            f"part: {first.part!r} of the {len(trace.requests)} requests of {trace.name} is empty",
            field="part",
            hint="give --part all --history 0, or record more requests",
        )
    learners = {name: _learner(name, trace) for name in first.policies if name != "belady"}
    _remember(trace, first, list(learners.values()))
    return [_replayed(trace, part, job, learners) for job in jobs]


def _replayed(
    trace: RoutingTrace, part: Sequence[Request], job: Job, learners: Mapping[str, Contender]
) -> Outcome:
    steps = make_steps(whole_requests(part, job.num_tokens), job.steps)
    contenders = list(_contenders(trace, steps, job, learners))
    asked = replay(trace, steps, contenders)
    figures = _figures(trace.name, job.steps, contenders, int(asked.sum()))
    groups = _by_group(trace, steps, contenders, asked) if job.steps == "single" else {}
    return Outcome(sum(map(len, steps)), figures, groups)


def _remember(trace: RoutingTrace, job: Job, learners: Sequence[Contender]) -> None:
    """What came before the replay; an oracle needs no past."""
    if not job.history_tokens:
        return
    if job.part == "all":
        raise ConfigError("history: the whole trace is replayed; nothing is left to come before it")
    other = part_of(trace.requests, "tune" if job.part == "report" else "report")
    numbers = ExpertNumbers(trace.experts_per_layer)
    for step in one_by_one(whole_requests(other, job.history_tokens)):
        uses = numbered_uses(trace, step, numbers)
        for learner in learners:
            learner.remember(uses, step)


def part_of(requests: Sequence[Request], part: str) -> Sequence[Request]:
    """Requests are told apart, never tokens: what was tuned on one request says nothing new of the
    rest of it."""
    if part not in PARTS:
        raise ConfigError(f"part: {part!r}; allowed: {', '.join(PARTS)}", field="part")
    return {"tune": requests[0::2], "report": requests[1::2], "all": requests}[part]


def whole_requests(requests: Sequence[Request], num_tokens: int | None) -> Sequence[Request]:
    """About so many tokens in requests from all over the trace."""
    total = sum(r.length for r in requests)
    if num_tokens is None or total <= num_tokens:
        return requests
    count = max(1, round(len(requests) * num_tokens / total))
    places = np.linspace(0, len(requests) - 1, count).round().astype(int)
    return [requests[place] for place in places]


def make_steps(requests: Sequence[Request], kind: str) -> list[Step]:
    name, _, number = kind.partition(":")
    if kind == "single":
        return one_by_one(requests)
    if name in ("streams", "chunk") and number.isdigit() and int(number) > 0:
        size = int(number)
        return merged(requests, size) if name == "streams" else chunks(requests, size)
    raise ConfigError(
        f"steps: {kind!r}; allowed: single, streams:N, chunk:N with N of 1 or more", field="steps"
    )


class MarkovForesight:
    """What the `markov` predictor says after each layer, learning as it goes."""

    def __init__(self, trace: RoutingTrace) -> None:
        self._trace = trace
        self._predictor = MarkovPredictor(trace.experts_per_layer, MARKOV_DEPTH)
        self._place = {layer: rank for rank, layer in enumerate(trace.layers)}

    def __call__(self, layer: int, step: Step) -> Mapping[int, NDArray[np.float32]]:
        place = self._place[layer]
        ids = torch.from_numpy(self._trace.ids[step, place])
        weights = torch.from_numpy(self._trace.weights[step, place])
        told = self._predictor.predict(layer, torch.empty(len(step), 0), Routing(ids, weights))
        return {ahead: chances.numpy() for ahead, chances in told.probabilities.items()}


def _learner(name: str, trace: RoutingTrace) -> Contender:
    """A policy that has seen nothing, and no tier that it rules."""
    policy, _, predictor = name.partition("+")
    numbers = ExpertNumbers(trace.experts_per_layer)
    return Contender(
        name,
        build_policy(policy, trace.experts_per_layer),
        [TierReplay(numbers, Rules(1.0))],
        MarkovForesight(trace) if predictor else None,
    )


def _contenders(
    trace: RoutingTrace, steps: Sequence[Step], job: Job, learners: Mapping[str, Contender]
) -> list[Contender]:
    rules = [Rules(share, per_layer) for per_layer, share in product((False, True), job.shares)]
    contenders: list[Contender] = []
    for name in job.policies:
        if name == "belady":
            contenders.append(_optimum(trace, steps, rules))
        else:
            contenders += _followers(learners[name], trace, rules)
    return contenders


def _optimum(trace: RoutingTrace, steps: Sequence[Step], rules: Sequence[Rules]) -> Contender:
    # It may leave an expert out, and overwrite one as soon as it has been read.
    free = [replace(r, bypass=True, keep_used=False) for r in rules]
    numbers = ExpertNumbers(trace.experts_per_layer)
    tiers = [TierReplay(numbers, r) for r in free]
    return Contender("belady", BeladyPolicy(numbers, all_uses(trace, steps)), tiers)


def _followers(
    learner: Contender, trace: RoutingTrace, rules: Sequence[Rules]
) -> Iterator[Contender]:
    """What goes on from what the learner knows, over empty slots; it stays as it is."""
    if learner.name == "least_stale":  # remembers arrivals, which differ from tier to tier
        groups = [[r] for r in rules]
    elif learner.foresight is not None:
        groups = [[r for r in rules if not r.per_layer]]
    elif learner.name == "score":
        groups = [[*rules, *(replace(r, bypass=True) for r in rules)]]
    else:
        groups = [list(rules)]
    kept = {id(trace): trace}  # which nobody changes
    for group in groups:
        tiers = [TierReplay(learner.tiers[0].numbers, r) for r in group]
        policy, foresight = deepcopy((learner.policy, learner.foresight), dict(kept))
        yield Contender(learner.name, policy, tiers, foresight)


def _figures(trace: str, steps: str, contenders: Sequence[Contender], asked: int) -> list[Figure]:
    """Hit rates, and how they stand between LRU and Belady with the same slots.

    None where a trace has too few requests for such steps.
    """
    if not asked:
        return []
    rates: dict[tuple[bool, float], dict[str, float]] = {}
    for contender in contenders:
        for tier in contender.tiers:
            name = contender.name + ("+bypass" if _may_bypass(contender, tier) else "")
            setting = rates.setdefault((tier.rules.per_layer, tier.rules.share), {})
            setting[name] = sum(tier.hits) / asked
    return [
        Figure(
            trace,
            steps,
            "per layer" if per_layer else "shared",
            share,
            name,
            rate,
            _closed(rate, found.get("lru"), found.get("belady")),
        )
        for (per_layer, share), found in rates.items()
        for name, rate in found.items()
    ]


def _may_bypass(contender: Contender, tier: TierReplay) -> bool:
    return tier.rules.bypass and contender.name != "belady"


def _closed(rate: float, low: float | None, high: float | None) -> float | None:
    if low is None or high is None or high <= low:
        return None
    return (rate - low) / (high - low)


def _by_group(
    trace: RoutingTrace,
    steps: Sequence[Step],
    contenders: Sequence[Contender],
    asked: NDArray[np.int64],
) -> dict[str, dict[str, float]]:
    """Hit rates by kind of request, slots shared: {"lru 0.25": {group: rate}}."""
    starts = np.array([r.start for r in trace.requests])
    order = np.argsort(starts)
    firsts = np.array([step[0] for step in steps])
    owners = order[np.searchsorted(starts[order], firsts, side="right") - 1]
    names, place = np.unique([trace.requests[owner].group for owner in owners], return_inverse=True)
    total = np.bincount(place, asked)
    found = {}
    for contender in contenders:
        for tier in contender.tiers:
            if tier.rules.per_layer or _may_bypass(contender, tier):
                continue
            rates = np.bincount(place, tier.hits) / total
            key = f"{contender.name} {tier.rules.share:g}"
            found[key] = dict(zip(names.tolist(), rates.tolist(), strict=True))
    return found
