"""The real request scheduler and block manager on a simulated clock, without a model.

A discrete-event loop: requests arrive at given times, or when others end; every step lasts as long
as a cost model says, every output ends at a given length. Used to compare admission rules on traces
of real traffic (`scripts/bench_admission.py`), and by the planner with the costs of a calibrated
machine. Times are simulated seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol

from moeserve.config import SchedulerConfig
from moeserve.core import EngineRequest, EngineStats, SamplingParams
from moeserve.engine.admission import AdmissionPolicy
from moeserve.engine.batch import SampledToken, ScheduledBatch, StepResult
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.request_scheduler import RequestScheduler

END: Final = -1  # end-of-sequence; prompts hold no negative ids


@dataclass(frozen=True)
class Arrival:
    """A request of a trace. max_tokens: what its client asks for; num_output_tokens: what comes."""

    at_s: float
    token_ids: list[int]
    num_output_tokens: int
    max_tokens: int


class StepClock(Protocol):
    """How long steps take."""

    def seconds(self, batch: ScheduledBatch) -> float:
        """Of one step; called once for each, in order."""
        ...


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: weights are read once, each token computed, each context's kv read."""

    fixed_s: float
    per_token_s: float
    per_kv_token_s: float

    def seconds(self, batch: ScheduledBatch) -> float:
        kv_tokens = sum(chunk.stop for chunk in batch.chunks)
        return self.fixed_s + self.per_token_s * batch.num_tokens + self.per_kv_token_s * kv_tokens


@dataclass(frozen=True)
class Slo:
    """A request is good when its first token and every later one came in time."""

    ttft_s: float
    max_tpot_s: float  # longest gap between two consecutive tokens of one request


@dataclass
class RequestTimes:
    """When the tokens of one request came."""

    arrived_s: float
    num_output_tokens: int
    first_s: float | None = None
    last_s: float = 0.0
    longest_gap_s: float = 0.0
    received: int = 0
    num_cached_tokens: int = 0

    def token(self, now_s: float) -> None:
        if self.first_s is None:
            self.first_s = now_s
        else:
            self.longest_gap_s = max(self.longest_gap_s, now_s - self.last_s)
        self.last_s = now_s
        self.received += 1

    @property
    def ttft_s(self) -> float:
        return float("inf") if self.first_s is None else self.first_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Mean time between two tokens; 0 where there is only one."""
        return (self.last_s - (self.first_s or 0.0)) / max(self.received - 1, 1)

    def good(self, slo: Slo) -> bool:
        complete = self.received == self.num_output_tokens
        return complete and self.ttft_s <= slo.ttft_s and self.longest_gap_s <= slo.max_tpot_s


@dataclass
class SimulationResult:
    """requests: in order of arrival. emitted: the end of every step, and how many tokens it gave.
    end_s: when the last request ended."""

    requests: list[RequestTimes] = field(default_factory=list)
    emitted: list[tuple[float, int]] = field(default_factory=list)
    stats: EngineStats = field(default_factory=EngineStats)
    end_s: float = 0.0
    num_steps: int = 0
    mean_running: float = 0.0
    mean_kv_use: float = 0.0  # part of the pool held, averaged over time


class Simulation:
    """One scheduler with its pool, fed from a trace."""

    def __init__(
        self,
        config: SchedulerConfig,
        num_blocks: int,
        block_tokens: int,
        cost: StepClock,
        admission: AdmissionPolicy | None = None,
        prefix_reuse: bool = True,
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_tokens, prefix_reuse)
        no_limit = 1 << 40  # the pool is what limits lengths here
        self.scheduler = RequestScheduler(config, self.blocks, (END,), no_limit, admission)
        self._cost = cost
        self._result = SimulationResult()
        self._running_s = self._held_s = self._busy_s = 0.0

    def run(self, arrivals: Iterable[Arrival]) -> SimulationResult:
        """Plays a whole trace; `arrivals` come in order of time and are read as they come due."""
        upcoming = iter(arrivals)
        arrival = next(upcoming, None)
        now_s = 0.0
        while True:
            while arrival is not None and arrival.at_s <= now_s:
                self._add(arrival, arrival.at_s)
                arrival = next(upcoming, None)
            batch = self.scheduler.schedule(now_s)
            if batch is not None:
                now_s += self._step(batch, now_s)
            elif arrival is not None:
                now_s = arrival.at_s
            else:
                return self._ended(now_s)

    def run_closed(self, arrivals: Iterable[Arrival], concurrency: int) -> SimulationResult:
        """So many clients, each of which sends its next request when its last one has ended: times
        of arrival are not those of the trace."""
        upcoming = iter(arrivals)
        now_s = 0.0
        while True:
            missing = concurrency - self.scheduler.num_running - self.scheduler.num_waiting
            for arrival in islice(upcoming, missing):
                self._add(arrival, now_s)
            batch = self.scheduler.schedule(now_s)
            if batch is None:
                return self._ended(now_s)
            now_s += self._step(batch, now_s)

    def _ended(self, now_s: float) -> SimulationResult:
        assert not self.scheduler.has_work
        result = self._result
        result.stats = self.scheduler.stats()
        result.end_s = now_s
        busy_s = max(self._busy_s, 1e-12)
        result.mean_running = self._running_s / busy_s
        result.mean_kv_use = self._held_s / busy_s / self.blocks.num_blocks
        return result

    def _add(self, arrival: Arrival, now_s: float) -> None:
        number = len(self._result.requests)
        self._result.requests.append(RequestTimes(now_s, arrival.num_output_tokens))
        request = EngineRequest(
            request_id=str(number),
            token_ids=arrival.token_ids,
            params=SamplingParams(max_tokens=arrival.max_tokens),
        )
        self.scheduler.add(request, now_s)

    def _step(self, batch: ScheduledBatch, now_s: float) -> float:
        """Runs a batch; returns how long it took."""
        step_s = self._cost.seconds(batch)
        self._busy_s += step_s
        self._running_s += step_s * self.scheduler.num_running
        self._held_s += step_s * self.blocks.num_held
        self._result.num_steps += 1
        tokens = {name: SampledToken(token_id) for name, token_id in self._sampled(batch)}
        self._result.emitted.append((now_s + step_s, len(tokens)))
        for delta in self.scheduler.commit(batch, StepResult(tokens), now_s + step_s):
            times = self._result.requests[int(delta.request_id)]
            times.num_cached_tokens = delta.num_cached_tokens
            times.token(now_s + step_s)
        return step_s

    def _sampled(self, batch: ScheduledBatch) -> Iterator[tuple[str, int]]:
        for chunk in batch.chunks:
            if chunk.samples:
                sequence = chunk.sequence
                number = int(sequence.request_id)
                wanted = self._result.requests[number].num_output_tokens
                last = sequence.num_output_tokens + 1 == wanted
                # A negative number per request: its output is like no prompt and no other output.
                yield sequence.request_id, END if last else -2 - number
