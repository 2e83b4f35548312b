"""What the parts of the planner hand each other. Values only: no torch, nothing is computed here.

PlanRequest   what was asked                     (command.py, from flags)
ModelShape    what the model's sizes are         (model_shape.py, from config.json alone)
MemoryPlan    what stands in which tier          (memory.py)
Deployment    all of it, checked: what both stages compute from   (deployment.py)
StepLoad      what one engine step computes; how long it takes: step_costs.py
Estimate      what comes out, of stage 1 (bound.py) and of stage 2 (simulate/)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType

from moeserve.cache.expert_cache import Tier
from moeserve.config import EngineConfig, ExpertConfig
from moeserve.core import ConfigError, ExpertSpec
from moeserve.experts.schedule.profile import Profile

#: of one number of a compute dtype
NUMBER_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
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
class Matrix:
    """One product of a layer: [rows, cols] weights as they are stored.

    form: `PackFormat.describe()` or the dtype of plain weights. num_bytes: as stored. packed: for
    the native kernels, in memory of its own. per_head: each head has weights of its own, and torch
    multiplies them (latent attention). ffn: gate, up and down of a dense FFN or a shared expert,
    which are stored and computed as one expert.
    """

    name: str
    rows: int
    cols: int
    form: str
    num_bytes: int
    packed: bool = True
    per_head: bool = False
    ffn: bool = False

    @property
    def read_bytes(self) -> int:
        """What a product reads: of a tied head that is stored once, the embedding."""
        return self.num_bytes or self.rows * self.cols * NUMBER_BYTES[self.form]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """num_heads: of queries. score_width: numbers of a key that a query meets. value_width: of a
    value. kv_heads, kv_width: numbers that one token leaves in the kv pool are their product.
    window: keys a query sees; None: all before it."""

    num_heads: int
    score_width: int
    value_width: int
    kv_heads: int
    kv_width: int
    window: int | None

    def keys(self, position_tokens: int) -> int:
        """Keys that a query at the end of so many tokens sees."""
        return position_tokens if self.window is None else min(position_tokens, self.window)


@dataclass(frozen=True, kw_only=True)
class ExpertsShape:
    """The routed experts of one layer. form: of gate and up, and of down where they agree.
    record_bytes: of one expert, in every tier."""

    spec: ExpertSpec
    top_k: int
    form: str
    record_bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """products: everything that every token is multiplied with: attention, router, dense FFN,
    shared experts. other_bytes: norms, biases. experts: None in a dense layer."""

    index: int
    attention: AttentionShape
    products: tuple[Matrix, ...]
    other_bytes: int
    experts: ExpertsShape | None


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model as its sizes. dtype: of computation and kv. context_tokens: the model's own limit.
    embedding_bytes, other_bytes: beside the layers. head: stored apart also where it is tied.
    native: whether weights are packed for the native kernels; else they are tensors.
    packed: whether they come from a `moeserve pack` directory, mapped."""

    name: str
    path: Path
    model_type: str
    dtype: str
    hidden_size: int
    vocab_size: int
    context_tokens: int
    num_parameters: int
    embedding_bytes: int
    other_bytes: int
    head: Matrix
    layers: tuple[LayerShape, ...]
    native: bool = True
    packed: bool = False

    @property
    def number_bytes(self) -> int:
        """Of one number of the compute dtype."""
        return NUMBER_BYTES[self.dtype]

    @property
    def kv_token_bytes(self) -> int:
        """kv of one token in all layers."""
        numbers = sum(s.attention.kv_heads * s.attention.kv_width for s in self.layers)
        return numbers * self.number_bytes

    @property
    def expert_bytes(self) -> int:
        """All routed experts of all layers."""
        return sum(
            s.experts.record_bytes * s.experts.spec.num_experts
            for s in self.layers
            if s.experts is not None
        )

    @property
    def num_experts(self) -> int:
        """Routed experts of all layers."""
        return sum(s.experts.spec.num_experts for s in self.layers if s.experts is not None)

    @property
    def rest_bytes(self) -> int:
        """All weights but routed experts."""
        layers = sum(s.other_bytes + sum(m.num_bytes for m in s.products) for s in self.layers)
        return self.embedding_bytes + self.other_bytes + self.head.num_bytes + layers


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
