"""Recorded traffic on the simulated engine: goodput under targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

from moeserve.core import ConfigError
from moeserve.engine.batch import ScheduledBatch
from moeserve.engine.simulation import Arrival, Simulation
from moeserve.planner.deployment import kv_blocks_of
from moeserve.planner.plan_types import Deployment, Limit, PlanRequest
from moeserve.planner.second_process import second_process
from moeserve.planner.shapes import ModelShape
from moeserve.planner.simulate.clock import EngineClock
from moeserve.planner.simulate.routing import SimulatedRouting
from moeserve.planner.simulate.system import (
    choose_routing,
    error_basis,
    error_of,
    make_clock,
    warm_up,
)
from moeserve.planner.workload import Workload
from moeserve.planner.workload_outcome import Answer, Outcome, SloTargets

#: tokens of all requests from which a process is worth the two seconds that it takes to start
APART_TOKENS = 200_000


@dataclass(frozen=True)
class TrafficEstimate:
    """mid: what is most likely. low, high: with an engine as slow, and as fast, as it may be.
    most_at_once: requests that had come and had not ended, at most, in mid."""

    mid: Outcome
    low: Outcome
    high: Outcome
    limits: tuple[Limit, ...]
    hit_rate: float | None
    confidence: float
    basis: str
    most_at_once: int

    def as_json(self) -> dict[str, Any]:
        return {
            "mid": self.mid.as_json(),
            "low": self.low.as_json(),
            "high": self.high.as_json(),
            "hit_rate": self.hit_rate,
            "confidence": self.confidence,
            "basis": self.basis,
            "most_at_once": self.most_at_once,
        }


class ScaledClock:
    """A clock whose steps all take so many times as long."""

    def __init__(self, clock: EngineClock, factor: float) -> None:
        self._clock = clock
        self._factor = factor

    def seconds(self, batch: ScheduledBatch) -> float:
        return self._clock.seconds(batch) * self._factor


def simulate_traffic(
    deployment: Deployment, workload: Workload, slo: SloTargets, seed: int = 0
) -> TrafficEstimate:
    """Raises ConfigError where a request is longer than the model's context or the kv pool."""
    check_lengths(deployment.request, deployment.shape, workload)
    routings = choose_routing(deployment, seed, alone=True)
    error, confidence = error_of(deployment.profile)
    clock = make_clock(deployment, routings.mid)
    warm_up(deployment, clock)
    with ExitStack() as stack:
        ends = _begin_ends(stack, deployment, workload, slo, routings.mid, error)
        answers = _play(deployment, workload, clock, 1.0)
        low, high = ends()
    return TrafficEstimate(
        mid=Outcome.of(answers, slo),
        low=low,
        high=high,
        limits=clock.busy.limits(),
        hit_rate=clock.hit_rate,
        confidence=confidence,
        basis=f"{routings.basis}; {error_basis(deployment.profile, error)}",
        most_at_once=most_at_once(answers),
    )


Ends = tuple[Outcome, Outcome]


def _begin_ends(
    stack: ExitStack,
    deployment: Deployment,
    workload: Workload,
    slo: SloTargets,
    routing: SimulatedRouting | None,
    error: float,
) -> Callable[[], Ends]:
    """What waits for the slowest and the fastest engine. Much traffic has a process of its own for
    them, until the stack is unwound: they are two of three simulations."""
    simulated = partial(_ends, deployment, workload, slo, routing, error)
    num_tokens = workload.prompt_tokens + workload.output_tokens
    executor = None if num_tokens < APART_TOKENS else second_process(stack)
    return simulated if executor is None else executor.submit(simulated).result


def _ends(
    deployment: Deployment,
    workload: Workload,
    slo: SloTargets,
    routing: SimulatedRouting | None,
    error: float,
) -> Ends:
    # They are as far off as the error says: one clock that knows kinds of steps serves both.
    clock = make_clock(deployment, routing, quickly=True)
    warm_up(deployment, clock)
    low, high = (
        Outcome.of(_play(deployment, workload, clock, factor), slo)
        for factor in (1 + error, 1 / (1 + error))
    )
    return low, high


def most_at_once(answers: Sequence[Answer]) -> int:
    """Requests between their arrival and their end at the same time, at most."""
    come = [(answer.arrived_s, 1) for answer in answers]
    gone = [(answer.ended_s, -1) for answer in answers]  # of one moment, before who comes then
    return max(accumulate(change for _, change in sorted(come + gone)))


def check_lengths(request: PlanRequest, shape: ModelShape, workload: Workload) -> None:
    """ConfigError for what a server would refuse. What the hint says keeps all limits at once."""
    longest, context, size = workload.longest, shape.context_tokens, request.engine.kv.block_tokens
    pool = size * kv_blocks_of(request.engine, shape)
    limits = ((context, f"the model's context is {context}"), (pool, f"the kv pool holds {pool}"))
    for limit, words in limits:
        if longest > limit:
            raise ConfigError(
                f"workload: {workload.name} has a request of {longest} tokens, {words}",
                field="workload",
                hint=f"shorten its requests with --clip {min(context, pool)}",
            )


def _play(
    deployment: Deployment,
    workload: Workload,
    clock: EngineClock,
    factor: float,
) -> list[Answer]:
    engine = deployment.request.engine
    # Nobody is refused here: who waits behind so many is late in any case.
    patient = replace(
        engine.scheduler, max_waiting=max(engine.scheduler.max_waiting, len(workload.requests))
    )
    simulation = Simulation(
        patient,
        deployment.num_kv_blocks,
        engine.kv.block_tokens,
        ScaledClock(clock, factor),
        prefix_reuse=engine.kv.prefix_reuse,
    )
    result = simulation.run(_arrivals(workload))
    return [
        Answer(
            arrived_s=times.arrived_s,
            ended_s=times.last_s,
            ttft_s=times.ttft_s,
            tpot_s=times.tpot_s,
            num_prompt=request.num_prompt,
            num_output=times.received,
        )
        for request, times in zip(workload.requests, result.requests, strict=True)
    ]


def _arrivals(workload: Workload) -> Iterator[Arrival]:
    """Clients ask for as many tokens as come: `bench serve` does."""
    for number, request in enumerate(workload.requests):
        ids = request.tokens(number)
        yield Arrival(request.at_s, ids, request.num_output, request.num_output)
