"""Clients that wait for their answers: what runs in which step, for any machine.

Requests come when others end, so nothing that the request scheduler decides depends on how long
steps take. It runs once, and what it decided is timed by as many clocks as there are routings and
deployments to be compared.

Long answers are simulated in units of several tokens: lengths and blocks are divided by the unit,
the request scheduler decides about units, and a step of it stands for as many steps of the engine
as a unit has tokens. Between them the engine's batches hardly change, so this loses little; without
it 64 answers of 10,000 tokens, for which there is kv one by one, would take minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moeserve.config import SchedulerConfig
from moeserve.engine.batch import ScheduledBatch, ScheduledChunk
from moeserve.engine.simulation import Arrival, RequestTimes, Simulation, StepClock
from moeserve.planner.plan_types import Deployment, Traffic

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """What ran. batches: of every step, without their blocks, from the token where they start; as
    many units as they compute. requests, emitted: as in
    `SimulationResult`, but times are counts of steps. running: sequences in each step. kv_use:
    share of the pool that they hold. unit: tokens for which one stands; the first of an answer
    stands for one alone, so on average it is tokens_each. batch_tokens: of a step of the engine, at
    most."""

    batches: tuple[ScheduledBatch, ...]
    requests: tuple[RequestTimes, ...]
    emitted: tuple[tuple[float, int], ...]
    running: Seconds
    kv_use: Seconds
    unit: int
    tokens_each: float
    batch_tokens: int

    def timed(self, clock: StepClock) -> Timed:
        """On a clock of a machine, which sees every step in order, or some of those that are alike:
        per unit one with prompts and one without."""
        if self.unit == 1:
            step_s = np.array([clock.seconds(batch) for batch in self.batches])
            return Timed(self, step_s, step_s)
        both = [self._stretched_s(clock, batch) for batch in self.batches]
        first_s, step_s = (np.array(column) for column in zip(*both, strict=True))
        return Timed(self, step_s, first_s)

    def _stretched_s(self, clock: StepClock, batch: ScheduledBatch) -> tuple[float, float]:
        """Until the prompts of a step of units are through, and all of it."""
        unit = self.unit
        decodes = [chunk for chunk in batch.chunks if _decodes(chunk)]
        prompts = [chunk for chunk in batch.chunks if not _decodes(chunk)]
        num_prompt = unit * sum(chunk.num_tokens for chunk in prompts)
        room = max(1, self.batch_tokens - len(decodes))
        with_prompts = -(-num_prompt // room)  # steps of the engine
        first_s = 0.0
        if with_prompts:
            parts = [
                replace(
                    chunk,
                    num_tokens=max(1, chunk.num_tokens * unit // with_prompts),
                )
                for chunk in prompts
            ]
            mixed = ScheduledBatch((*decodes, *parts), batch.step)
            first_s = with_prompts * clock.seconds(mixed)
        if not decodes:
            return first_s, first_s
        left = max(0, unit - with_prompts)
        alone_s = clock.seconds(ScheduledBatch(tuple(decodes), batch.step)) if left else 0.0
        return first_s or alone_s, first_s + left * alone_s


def _decodes(chunk: ScheduledChunk) -> bool:
    return chunk.num_tokens == 1 and chunk.samples and chunk.start > 0


class Timed:
    """Steps that take so many seconds each."""

    def __init__(self, steps: Steps, step_s: Seconds, first_s: Seconds) -> None:
        """first_s: of each step, until the prompts that end in it have their first token."""
        self._steps = steps
        self._step_s = step_s
        self._after_s = np.concatenate([[0.0], np.cumsum(step_s)])  # so many steps
        self._first_s = first_s

    @property
    def requests(self) -> list[RequestTimes]:
        """In order of arrival, in seconds; nothing is said of their longest gaps."""
        return [
            replace(
                times,
                arrived_s=self._at_s(times.arrived_s),
                first_s=None if times.first_s is None else self._first_at_s(times.first_s),
                last_s=self._at_s(times.last_s),
                longest_gap_s=0.0,
                num_output_tokens=round(times.num_output_tokens * self._steps.tokens_each),
                received=round(times.received * self._steps.tokens_each),
            )
            for times in self._steps.requests
        ]

    @property
    def emitted(self) -> list[tuple[float, float]]:
        """The end of every step, and how many tokens it gave."""
        each = self._steps.tokens_each
        return [(self._at_s(at), count * each) for at, count in self._steps.emitted]

    @property
    def mean_running(self) -> float:
        return float(self._steps.running @ self._step_s / self._step_s.sum())

    @property
    def mean_kv_use(self) -> float:
        return float(self._steps.kv_use @ self._step_s / self._step_s.sum())

    def _at_s(self, num_steps: float) -> float:
        return float(self._after_s[int(num_steps)])

    def _first_at_s(self, num_steps: float) -> float:
        last = int(num_steps) - 1
        return float(self._after_s[last] + self._first_s[last])


class _Recorder:
    """A clock on which every step takes one. unit: what places in a sequence are told in."""

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self.batches: list[ScheduledBatch] = []
        self.running: list[int] = []
        self.held: list[int] = []
        self.simulation: Simulation | None = None

    def seconds(self, batch: ScheduledBatch) -> float:
        assert self.simulation is not None
        chunks = [
            ScheduledChunk(
                chunk.sequence, chunk.start * self._unit, chunk.num_tokens, (), chunk.samples
            )
            for chunk in batch.chunks
        ]
        self.batches.append(ScheduledBatch(tuple(chunks), batch.step))
        self.running.append(self.simulation.scheduler.num_running)
        self.held.append(self.simulation.blocks.num_held)
        return 1.0


def steps_of(deployment: Deployment, traffic: Traffic, count: int, unit: int = 1) -> Steps:
    """Of so many requests of the traffic's lengths, by its clients. unit: tokens that count as
    one."""
    engine, block_tokens = deployment.request.engine, deployment.request.engine.kv.block_tokens
    in_units = replace(
        traffic,
        prompt_tokens=max(1, round(traffic.prompt_tokens / unit)),
        output_tokens=1 + round((traffic.output_tokens - 1) / unit),
    )
    # A block of less than a unit is a part of a larger one. One request always fits, however its
    # lengths were rounded.
    block_units = max(1, block_tokens // unit)
    longest = -(-in_units.sequence_tokens // block_units)
    num_blocks = max(longest, deployment.num_kv_blocks * block_tokens // (block_units * unit))
    pool = num_blocks, block_units, engine.kv.prefix_reuse
    each = traffic.output_tokens / in_units.output_tokens
    return _steps_of(engine.scheduler, *pool, in_units, count, unit, each)


@lru_cache(maxsize=8)
def _steps_of(
    scheduler: SchedulerConfig,
    num_blocks: int,
    block_tokens: int,
    prefix_reuse: bool,
    traffic: Traffic,
    count: int,
    unit: int,
    tokens_each: float,
) -> Steps:
    """Kept: most of the deployments that advice compares run the same steps."""
    recorder = _Recorder(unit)
    simulation = Simulation(
        scheduler, num_blocks, block_tokens, recorder, prefix_reuse=prefix_reuse
    )
    recorder.simulation = simulation
    result = simulation.run_closed(requests_of(traffic, count), traffic.concurrency)
    for sequence in {chunk.sequence for batch in recorder.batches for chunk in batch.chunks}:
        sequence.token_ids.clear()  # the most of what would be kept, and clocks ask for lengths
    return Steps(
        tuple(recorder.batches),
        tuple(result.requests),
        tuple(result.emitted),
        np.array(recorder.running, np.float64),
        np.array(recorder.held, np.float64) / num_blocks,
        unit,
        tokens_each,
        scheduler.max_batch_tokens,
    )


def requests_of(traffic: Traffic, count: int) -> Iterator[Arrival]:
    """Of the traffic's lengths; no prompt is like another."""
    for number in range(count):
        prompt = [number] * traffic.prompt_tokens
        yield Arrival(0.0, prompt, traffic.output_tokens, traffic.output_tokens)
