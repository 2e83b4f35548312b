"""Clients that wait for their answers: what runs in which step, for any machine.

Requests come when others end, so nothing that the request scheduler decides depends on how long
steps take. It runs once, and what it decided is timed by as many clocks as there are routings and
deployments to be compared.
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
    """What ran. batches: of every step, without their blocks. requests, emitted: as in
    `SimulationResult`, but times are counts of steps. running: sequences in each step. kv_use:
    share of the pool that they hold."""

    batches: tuple[ScheduledBatch, ...]
    requests: tuple[RequestTimes, ...]
    emitted: tuple[tuple[float, int], ...]
    running: Seconds
    kv_use: Seconds

    def timed(self, clock: StepClock) -> Timed:
        """On a clock of a machine, which sees every step in order."""
        return Timed(self, np.array([clock.seconds(batch) for batch in self.batches]))


class Timed:
    """Steps that take so many seconds each."""

    def __init__(self, steps: Steps, step_s: Seconds) -> None:
        self._steps = steps
        self._step_s = step_s
        self._after_s = np.concatenate([[0.0], np.cumsum(step_s)])  # so many steps

    @property
    def requests(self) -> list[RequestTimes]:
        """In order of arrival, in seconds; nothing is said of their longest gaps."""
        return [
            replace(
                times,
                arrived_s=self._at_s(times.arrived_s),
                first_s=None if times.first_s is None else self._at_s(times.first_s),
                last_s=self._at_s(times.last_s),
                longest_gap_s=0.0,
            )
            for times in self._steps.requests
        ]

    @property
    def emitted(self) -> list[tuple[float, int]]:
        """The end of every step, and how many tokens it gave."""
        return [(self._at_s(at), count) for at, count in self._steps.emitted]

    @property
    def mean_running(self) -> float:
        return float(self._steps.running @ self._step_s / self._step_s.sum())

    @property
    def mean_kv_use(self) -> float:
        return float(self._steps.kv_use @ self._step_s / self._step_s.sum())

    def _at_s(self, num_steps: float) -> float:
        return float(self._after_s[int(num_steps)])


class _Recorder:
    """A clock on which every step takes one."""

    def __init__(self) -> None:
        self.batches: list[ScheduledBatch] = []
        self.running: list[int] = []
        self.held: list[int] = []
        self.simulation: Simulation | None = None

    def seconds(self, batch: ScheduledBatch) -> float:
        assert self.simulation is not None
        chunks = [
            ScheduledChunk(chunk.sequence, chunk.start, chunk.num_tokens, (), chunk.samples)
            for chunk in batch.chunks
        ]
        self.batches.append(ScheduledBatch(tuple(chunks), batch.step))
        self.running.append(self.simulation.scheduler.num_running)
        self.held.append(self.simulation.blocks.num_held)
        return 1.0


def steps_of(deployment: Deployment, traffic: Traffic, count: int) -> Steps:
    """Of so many requests of the traffic's lengths, by its clients."""
    engine = deployment.request.engine
    pool = deployment.num_kv_blocks, engine.kv.block_tokens, engine.kv.prefix_reuse
    return _steps_of(engine.scheduler, *pool, traffic, count)


@lru_cache(maxsize=8)
def _steps_of(
    scheduler: SchedulerConfig,
    num_blocks: int,
    block_tokens: int,
    prefix_reuse: bool,
    traffic: Traffic,
    count: int,
) -> Steps:
    """Kept: most of the deployments that advice compares run the same steps."""
    recorder = _Recorder()
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
    )


def requests_of(traffic: Traffic, count: int) -> Iterator[Arrival]:
    """Of the traffic's lengths; no prompt is like another."""
    for number in range(count):
        prompt = [number] * traffic.prompt_tokens
        yield Arrival(0.0, prompt, traffic.output_tokens, traffic.output_tokens)
