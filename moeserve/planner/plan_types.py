"""What the parts of the planner hand each other. Values only: no torch, nothing is computed here.

PlanRequest   what was asked                     (command.py, from flags)
MemoryPlan    what stands in which tier          (memory.py)
Deployment    all of it and the model's sizes (shapes.py), checked: what both stages compute from
              (deployment.py)
StepLoad      what one engine step computes; how long it takes: step_costs.py
Estimate      what comes out, of stage 1 (bound.py) and of stage 2 (simulate/)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from moeserve.cache.expert_cache import Tier
from moeserve.config import EngineConfig, ExpertConfig
from moeserve.core import ConfigError
from moeserve.experts.schedule.profile import Profile
from moeserve.planner.shapes import ModelShape

#: predictors that look at nothing but what was chosen
BY_ROUTING = ("none", "frequency", "markov")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """concurrency: requests that run side by side, each replaced when it ends. prompt_tokens,
    output_tokens: of each request."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int

    @property
    def sequence_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """engine: the settings that `serve` would be given; engine.model.model may be a config.json.
    hardware: a profile's file, or the name of a shipped one; None: this machine, as calibrated.
    foreign: a profile that was measured on another machine is meant. trace: recorded routing
    (`moeserve trace`), for hit rates; None: from popularity. longest_tokens: of one request, prompt
    and output, where recorded traffic has longer ones than `traffic`, which is their mean."""

    engine: EngineConfig
    traffic: Traffic
    hardware: str | None = None
    foreign: bool = False
    trace: Path | None = None
    longest_tokens: int = 0


@dataclass(frozen=True)
class MemoryPart:
    """One line of a memory plan. exact: False for what was measured on another process, such as
    that of the interpreter and its libraries. peak_only: needed for moments, not all the time."""

    name: str
    tier: Tier
    num_bytes: int
    exact: bool = True
    peak_only: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """What the engine's process takes, part by part. limits: bytes that each tier may take."""

    parts: tuple[MemoryPart, ...]
    limits: dict[Tier, int]

    def steady_bytes(self, tier: Tier) -> int:
        return sum(p.num_bytes for p in self.parts if p.tier is tier and not p.peak_only)

    def peak_bytes(self, tier: Tier) -> int:
        return sum(p.num_bytes for p in self.parts if p.tier is tier)

    @property
    def fits(self) -> bool:
        return all(self.peak_bytes(tier) <= limit for tier, limit in self.limits.items())


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A request that has been checked and sized: what both stages compute from.

    num_kv_blocks: of the pool. host_slots: experts with room in memory where the others are on
    disk; None: all are resident. device_slots: the same of a device over host; None: no device.
    num_threads: that compute. profile: of the machine, and costs follow from nothing else.
    """

    request: PlanRequest
    shape: ModelShape
    profile: Profile
    memory: MemoryPlan
    num_kv_blocks: int
    host_slots: int | None
    device_slots: int | None
    num_threads: int


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens of one request in a step: positions start to start + num_tokens."""

    start: int
    num_tokens: int
    samples: bool = False


@dataclass(frozen=True)
class StepLoad:
    """One engine step. decode_contexts: of each decoding sequence, the tokens that its row sees,
    itself included."""

    decode_contexts: Sequence[int] = ()
    chunks: Sequence[Chunk] = ()

    @property
    def num_rows(self) -> int:
        return len(self.decode_contexts) + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_sampled(self) -> int:
        return len(self.decode_contexts) + sum(chunk.samples for chunk in self.chunks)


@dataclass(frozen=True)
class Range:
    """A predicted value. low, high: so many of the cases fall between as the estimate's confidence
    says."""

    low: float
    mid: float
    high: float

    def at_least(self, bound: float) -> Range:
        """Without what lies below it, but with the middle."""
        return Range(min(self.mid, max(self.low, bound)), self.mid, self.high)

    def at_most(self, bound: float) -> Range:
        """Without what lies above it, but with the middle."""
        return Range(self.low, self.mid, max(self.mid, min(self.high, bound)))


class Resource(str, Enum):
    """What a phase can wait for."""

    CPU_MEMORY = "memory bandwidth of the CPU"
    CPU_COMPUTE = "arithmetic of the CPU"
    DEVICE_MEMORY = "memory bandwidth of the device"
    DEVICE_COMPUTE = "arithmetic of the device"
    LINK = "link to the device"
    DISK = "disk"
    KV_ROOM = "memory for kv"
    OVERHEAD = "engine's own work per step"


@dataclass(frozen=True)
class Limit:
    """phase: prefill or decode. resource: what it waits for. next_resource: what would limit if
    that were no limit, and by what factor the phase would then be faster."""

    phase: str
    resource: Resource
    next_resource: Resource
    headroom: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """stage: "bound", which nothing can beat, or "system", our engine simulated.

    ttft_s: to the first token of a request. tpot_s: between its tokens; None where it has one only,
    and no step decodes. output_tokens_per_s: of all requests together. confidence: share of cases
    that lie in the ranges, 0 to 1: as measured, or guessed; `basis` says which, and from what.
    hit_rate: of experts in the fast tier; None where all are there.
    """

    stage: str
    ttft_s: Range
    tpot_s: Range | None
    output_tokens_per_s: Range
    prompt_tokens_per_s: Range
    limits: tuple[Limit, ...]
    confidence: float
    basis: str
    hit_rate: float | None = None

    def within(self, bound: Estimate) -> Estimate:
        """Without the parts of its ranges that nothing can reach."""
        tpot_s = self.tpot_s
        if tpot_s is not None and bound.tpot_s is not None:
            tpot_s = tpot_s.at_least(bound.tpot_s.low)
        return replace(
            self,
            ttft_s=self.ttft_s.at_least(bound.ttft_s.low),
            tpot_s=tpot_s,
            output_tokens_per_s=self.output_tokens_per_s.at_most(bound.output_tokens_per_s.high),
            prompt_tokens_per_s=self.prompt_tokens_per_s.at_most(bound.prompt_tokens_per_s.high),
        )


@dataclass(frozen=True)
class Advice:
    """A change, computed by planning again with it. flags: as on the command line, "" for hardware.
    factor: of output tokens per second; 1: no effect."""

    change: str
    flags: str
    factor: float
    fits: bool = True


def check_predictor(config: ExpertConfig) -> None:
    """ConfigError for a predictor that looks at what a plan has not."""
    if config.predictor not in BY_ROUTING:
        raise ConfigError(
            f"predictor: {config.predictor}: a plan has no hidden states or tokens, which all but"
            f" {', '.join(BY_ROUTING)} may look at",
            field="predictor",
            hint="plan with one of these",
        )


def check_no_workers(local_workers: int | None, workers: Sequence[str] | None) -> None:
    """ConfigError for expert workers, whose costs a plan does not know."""
    for name, given in (("local_workers", local_workers), ("workers", workers)):
        if given:
            raise ConfigError(
                f"{name}: a plan knows no expert workers",
                field=name,
                hint="plan without them; `moeserve bench serve` measures a server that has them",
            )
