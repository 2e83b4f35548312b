"""Requests from their arrival to their end on the simulated engine, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt

import numpy as np

from moeserve.cache.routing_trace import RoutingTrace, load_trace
from moeserve.engine.simulation import RequestTimes
from moeserve.experts.schedule.profile import Profile
from moeserve.planner.bound import bound
from moeserve.planner.plan_types import Deployment, Estimate, Limit, Range, Resource, Traffic
from moeserve.planner.simulate.clock import EngineClock
from moeserve.planner.simulate.closed import Timed, steps_of
from moeserve.planner.simulate.experts import ExpertsClock, ResidentClock
from moeserve.planner.simulate.on_device import DeviceLayerCosts
from moeserve.planner.simulate.on_device_experts import DeviceClock
from moeserve.planner.simulate.over_disk import DiskClock
from moeserve.planner.simulate.routing import (
    FEW_EXPERTS,
    HIGH_SKEW,
    LOW_SKEW,
    MID_SKEW,
    MOST_EXPERTS,
    SimulatedRouting,
    drawn,
    recorded,
)
from moeserve.planner.step_costs import EngineStepCosts

#: around a prediction, and of the cases of `make bench-plan` the share that at least lay between
#: the ends of their ranges (a test compares with what benchmarks/results has)
CONFIDENCE, MODEL_ERROR = 0.8, 0.12
#: for machines whose profile was not measured: rates of data sheets, and nothing of our engine. A
#: guess: no such prediction was compared with anything
SHEET_CONFIDENCE, SHEET_ERROR = 0.5, 0.35
#: requests of each client, of which the first and the last are not counted
ROUNDS, LEAST_ROUNDS = 4, 3
#: before anything counts: requests at least and at most, and output tokens of each at most
WARM_REQUESTS, MOST_WARM_REQUESTS, WARM_TOKENS = 6, 16, 32
#: output tokens beyond which fewer rounds are simulated
MOST_TOKENS = 40_000
LEAST_REQUESTS = 8
#: steps of the request scheduler, and sequences in all of them together, that are simulated before
#: several tokens count as one; units in an answer, at least
MOST_STEPS, MOST_SEQUENCES, LEAST_UNITS = 2_000, 40_000, 16
#: clients that are simulated, for each that may run at once: then one always waits to take over,
#: and what more of them do is wait longer
ENOUGH_CLIENTS = 2


def simulate(deployment: Deployment, seed: int = 0) -> Estimate:
    """The traffic of the deployment's request, its clients waiting for their answers. Ranges end
    where the bound does.

    Raises MoeserveError where the trace is of another model, ConfigError where the profile lacks
    what the deployment needs. The same seed gives the same estimate.
    """
    routings = choose_routing(deployment, seed)
    runs = [steady_run(deployment, routings.mid)]
    runs += [steady_run(deployment, other, quickly=True) for other in routings.others]
    return _estimate(deployment, routings, runs).within(bound(deployment))


def simulate_quickly(deployment: Deployment, seed: int = 0) -> Estimate:
    """The likeliest case alone and fewer requests: to compare many deployments with each other.
    Ranges may go beyond the bound."""
    routings = choose_routing(deployment, seed, alone=True)
    run = steady_run(deployment, routings.mid, LEAST_ROUNDS, quickly=True)
    return _estimate(deployment, routings, [run])


def _estimate(deployment: Deployment, routings: Routings, runs: Sequence[Steady]) -> Estimate:
    mid = runs[0]
    decodes = deployment.request.traffic.output_tokens > 1
    error, confidence = error_of(deployment.profile)

    def around(values: Sequence[float]) -> Range:
        return Range(min(values) / (1 + error), values[0], max(values) * (1 + error))

    return Estimate(
        stage="system",
        ttft_s=around([run.ttft_s for run in runs]),
        tpot_s=around([run.tpot_s for run in runs]) if decodes else None,
        output_tokens_per_s=around([run.tokens_per_s for run in runs]),
        prompt_tokens_per_s=around([run.prompt_tokens_per_s for run in runs]),
        limits=mid.limits,
        confidence=confidence,
        basis=f"{routings.basis}; {error_basis(deployment.profile, error)}",
        hit_rate=mid.hit_rate,
    )


@dataclass(frozen=True)
class Routings:
    """mid: what is most likely. others: what it could be, too. None: a dense model."""

    mid: SimulatedRouting | None
    others: tuple[SimulatedRouting, ...]
    basis: str


def choose_routing(deployment: Deployment, seed: int, alone: bool = False) -> Routings:
    """alone: the likeliest one is enough.

    The trace that the request names, else a popularity that is stated, and a wider range."""
    model, trace_path = deployment.shape, deployment.request.trace
    if not model.num_experts:
        return Routings(None, (), "a dense model")
    if trace_path is not None:
        trace = load_trace(trace_path)
        foreseen = deployment.request.engine.experts.predictor != "none"
        halves = [] if alone else [recorded(half, model, foreseen) for half in _halves(trace)]
        mid = recorded(trace, model, foreseen)
        return Routings(mid, tuple(halves), f"experts as {trace_path.name} chose them")
    skews = () if alone else (LOW_SKEW, HIGH_SKEW)
    return Routings(
        drawn(MID_SKEW, model, seed, FEW_EXPERTS if alone else MOST_EXPERTS),
        tuple(drawn(skew, model, seed) for skew in skews),
        "no routing is known: experts are assumed as unlike in use as between nearly even and"
        " gpt-oss (name a recorded one with --trace)",
    )


def _halves(trace: RoutingTrace) -> Iterator[RoutingTrace]:
    """The first and the second half of the requests; nothing where there is only one."""
    middle = len(trace.requests) // 2
    if middle:
        for part in (trace.requests[:middle], trace.requests[middle:]):
            yield replace(trace, requests=part)


def make_clock(
    deployment: Deployment, routing: SimulatedRouting | None, quickly: bool = False
) -> EngineClock:
    """Of this deployment; routing: None for a dense model."""
    model, scheduler = deployment.shape, deployment.request.engine.scheduler
    on_device = deployment.device_slots is not None
    over_disk = not on_device and leaves_experts_on_disk(deployment)
    costs = EngineStepCosts(model, deployment.profile, deployment.num_threads, over_disk)
    layers = DeviceLayerCosts(deployment) if on_device else costs
    experts: ExpertsClock | None = None
    most_rows = max(scheduler.max_batch_tokens, scheduler.max_running)
    if routing is not None and on_device:
        experts = DeviceClock(costs, routing, most_rows, deployment)
    elif routing is not None and over_disk:
        experts = DiskClock(costs, routing, most_rows, deployment)
    elif routing is not None:
        experts = ResidentClock(costs, routing, most_rows)
    return EngineClock(model.layers, layers, experts, quickly)


def leaves_experts_on_disk(deployment: Deployment) -> bool:
    """A tier with a slot for every expert is soon full, and its layers then run as resident ones
    (`ExpertCache.is_settled`)."""
    slots = deployment.host_slots
    return slots is not None and slots < deployment.shape.num_experts


@dataclass(frozen=True)
class Steady:
    """What clients see while all of them are busy."""

    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    hit_rate: float | None
    limits: tuple[Limit, ...]


def steady_run(
    deployment: Deployment,
    routing: SimulatedRouting | None,
    rounds: int = ROUNDS,
    quickly: bool = False,
) -> Steady:
    """One simulation with clients that wait for their answers."""
    asked, most = deployment.request.traffic, most_running(deployment)
    traffic = replace(asked, concurrency=min(asked.concurrency, ENOUGH_CLIENTS * most))
    clock = make_clock(deployment, routing, quickly)
    warm_up(deployment, clock)
    count = num_requests(traffic, rounds)
    unit = unit_of(deployment, traffic, count)
    result = steps_of(deployment, traffic, count, unit).timed(clock)
    window = steady_window(result.requests, traffic.concurrency)
    max_running = deployment.request.engine.scheduler.max_running
    span_s = window.end_s - window.begin_s
    tokens = sum(n for at_s, n in result.emitted if window.begin_s < at_s <= window.end_s)
    tokens_per_s = tokens / span_s
    # Of the clients that were left out, each is one more in the queue (J. Little, 1961).
    queued_s = (asked.concurrency - traffic.concurrency) * asked.output_tokens / tokens_per_s
    return Steady(
        ttft_s=float(np.mean([times.ttft_s for times in window.requests])) + queued_s,
        tpot_s=float(np.mean([times.tpot_s for times in window.requests])),
        tokens_per_s=tokens_per_s,
        prompt_tokens_per_s=tokens_per_s * traffic.prompt_tokens / traffic.output_tokens,
        hit_rate=clock.hit_rate,
        limits=with_kv_room(clock.busy.limits(), result, min(asked.concurrency, max_running)),
    )


def most_running(deployment: Deployment) -> int:
    """Sequences of the traffic that settings and kv let run at once: each holds its prompt."""
    engine = deployment.request.engine
    prompt_blocks = -(-deployment.request.traffic.prompt_tokens // engine.kv.block_tokens)
    return min(engine.scheduler.max_running, max(1, deployment.num_kv_blocks // prompt_blocks))


def num_requests(traffic: Traffic, rounds: int = ROUNDS) -> int:
    """Whole rounds of all clients: fewer where outputs are long, more where clients are few."""
    clients = traffic.concurrency
    affordable = MOST_TOKENS // (clients * traffic.output_tokens)
    return clients * max(LEAST_ROUNDS, min(rounds, affordable), -(-LEAST_REQUESTS // clients))


def unit_of(deployment: Deployment, traffic: Traffic, count: int) -> int:
    """Tokens that count as one in the simulation of so many requests."""
    block_tokens = deployment.request.engine.kv.block_tokens
    mean_length = traffic.prompt_tokens + traffic.output_tokens / 2
    by_kv = max(1.0, deployment.num_kv_blocks * block_tokens / mean_length)
    running = min(traffic.concurrency, most_running(deployment), by_kv)
    tokens = count * traffic.output_tokens
    wanted = max(1.0, tokens / running / MOST_STEPS, tokens / MOST_SEQUENCES)
    return max(1, min(ceil(wanted), traffic.output_tokens // LEAST_UNITS))


def warm_up(deployment: Deployment, clock: EngineClock) -> None:
    """Lets a cache see some requests before anything counts, so that it is full and has learnt."""
    if deployment.device_slots is None and not leaves_experts_on_disk(deployment):
        return
    traffic = deployment.request.traffic
    count = min(max(traffic.concurrency, WARM_REQUESTS), MOST_WARM_REQUESTS)
    shorter = replace(
        traffic,
        concurrency=min(traffic.concurrency, count),
        output_tokens=min(traffic.output_tokens, WARM_TOKENS),
    )
    steps_of(deployment, shorter, count).timed(clock)
    clock.begin(count)


@dataclass(frozen=True)
class Window:
    """requests: that arrived after the first of every client, and had neighbours to their end."""

    begin_s: float
    end_s: float
    requests: Sequence[RequestTimes]


def steady_window(requests: Sequence[RequestTimes], concurrency: int) -> Window:
    """requests: in order of arrival, whole rounds. As long as one ends another arrives: from the
    first arrival of the second round to that of the last all clients are busy, and both are at the
    same point of what may be a cycle."""
    last = len(requests) - concurrency
    window = Window(
        requests[concurrency].arrived_s, requests[last].arrived_s, requests[concurrency:last]
    )
    assert window.end_s > window.begin_s, "a round takes time"
    return window


def with_kv_room(limits: tuple[Limit, ...], result: Timed, allowed: int) -> tuple[Limit, ...]:
    """Where clients wait although the budget would let them run, kv is what limits decoding.

    allowed: as many as there are and may run.
    """
    if result.mean_running >= 0.9 * allowed or result.mean_kv_use < 0.5:
        return limits
    factor = allowed / result.mean_running
    return tuple(
        Limit(limit.phase, Resource.KV_ROOM, limit.resource, factor)
        if limit.phase == "decode"
        else limit
        for limit in limits
    )


def error_of(profile: Profile) -> tuple[float, float]:
    """How far a prediction may be off, as a share, and for how many of the cases that holds."""
    if profile.source != "measured" or profile.steps is None:
        return SHEET_ERROR, SHEET_CONFIDENCE
    return sqrt(MODEL_ERROR**2 + (spread_of(profile) / 2) ** 2), CONFIDENCE


def spread_of(profile: Profile) -> float:
    """The middle one of the spreads of what costs are made of."""
    spreads = [figure.spread for curve in profile.cpu.expert_curves for figure in curve.us]
    return float(np.median(spreads)) if spreads else 0.0


def error_basis(profile: Profile, error: float) -> str:
    """Where the range comes from, and what is known of it."""
    guess = f"the range, {error:.0%} to both sides, is a guess"
    if profile.source != "measured":
        return f"rates of data sheets, nothing measured: {guess}"
    if profile.steps is None:
        return f"a profile without steps of the engine: {guess}"
    return (
        f"costs measured on {profile.date}: {error:.0%} to both sides; of the configurations that"
        f" such ranges were compared with, at least {CONFIDENCE:.0%} lay within (docs/planner.md)"
    )
