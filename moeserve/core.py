"""Value types that more than one room uses: no torch at run time, no behaviour but validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from moeserve.stats import ExpertStats, MemoryStats, PageStats

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024


class ErrorCode(str, Enum):
    """Why a request was refused or ended; fronts map it to an HTTP status or a wire error."""

    INVALID = "invalid_request"
    CONTEXT_LENGTH = "context_length_exceeded"
    UNKNOWN_MODEL = "model_not_found"
    UNAUTHORIZED = "unauthorized"
    TOO_LARGE = "request_too_large"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "engine_unavailable"
    DEADLINE = "deadline_exceeded"
    CANCELLED = "cancelled"
    PROTOCOL = "protocol_error"
    INTERNAL = "internal_error"


class MoeserveError(Exception):
    """An error a user can act on: the message names the field, the value, the limit and the fix."""

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode = ErrorCode.INVALID,
        field: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message if hint is None else f"{message} ({hint})")
        self.code = code
        self.field = field
        self.hint = hint


class ConfigError(MoeserveError):
    """A setting that is wrong, contradictory or not implemented."""


class ModelError(MoeserveError):
    """A checkpoint that cannot be served: unknown family, unsupported field, broken weights."""


class RequestError(MoeserveError):
    """A request that cannot be served as sent."""


class ExpertKey(NamedTuple):
    """Name of one gated FFN: its MoE layer (index in the whole model) and its number there."""

    layer: int
    expert: int


@dataclass(frozen=True)
class Routing:
    """Which experts each token wants and how much of each.

    ids: [T, K] int64, expert numbers of one layer.
    weights: [T, K] in the router's dtype (float32), the factors of the weighted sum.
    """

    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class LayerUse:
    """What one step asks of the experts of one layer, over all rows of the batch.

    rows: [E] int32, rows that chose each expert. weights: [E] float32, the sum of their router
    weights for it.
    """

    layer: int
    rows: NDArray[np.int32]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Placement:
    """For one layer and step: where every active expert runs. The three sets are disjoint."""

    layer: int
    on_device: tuple[int, ...] = ()
    fetch_first: tuple[int, ...] = ()
    on_cpu: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """Shape and arithmetic of the experts of one MoE layer, which are all alike.

    activation: a name of `moeserve.cpu_backend.activations`: what config.json calls hidden_act, or
    "swiglu_clamped" (gpt-oss), to which alone swiglu_alpha and swiglu_limit apply.
    """

    num_experts: int  # E
    hidden_size: int  # H
    intermediate_size: int  # I
    activation: str = "silu"
    bias: bool = False
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    @property
    def num_weights(self) -> int:
        """Of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one MoE layer in the resident form: bf16, fp16 or fp32, contiguous.

    gate_up: [E, 2I, H], gate rows, then up rows. down: [E, H, I].
    gate_up_bias: [E, 2I], down_bias: [E, H]; both or none.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


def _check(field: str, value: object, good: bool, limit: str) -> None:
    if not good:
        raise RequestError(f"{field}: {value!r} is out of range; allowed: {limit}", field=field)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens. An instance is always valid: construction (and decoding) checks it.

    Raises RequestError naming the field, the value and the limit. Token ids in `logit_bias` and
    `stop_token_ids` are checked against the vocabulary by the engine, which knows its size.
    """

    max_tokens: int = 256  # 0: score the prompt only
    min_tokens: int = 0  # stop ids are masked before that many tokens
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output (CTRL, section 4.1)
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()  # besides the model's end-of-sequence ids
    ignore_eos: bool = False
    seed: int | None = None  # None: the engine draws one
    logprobs: int | None = None  # number of alternatives beside the chosen token, 0..20
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 0, "0 or more")
        in_range = 0 <= self.min_tokens <= self.max_tokens
        _check("min_tokens", self.min_tokens, in_range, f"0 to max_tokens ({self.max_tokens})")
        # `0 <= x` is false for NaN, so no value that is not a number passes.
        _check("temperature", self.temperature, 0 <= self.temperature <= 100, "0 to 100")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        repetition = self.repetition_penalty
        _check("repetition_penalty", repetition, 0 < repetition <= 10, "above 0, at most 10")
        for field in ("presence_penalty", "frequency_penalty"):
            value: float = getattr(self, field)
            _check(field, value, -2 <= value <= 2, "-2 to 2")
        for field in ("logprobs", "prompt_logprobs"):
            count: int | None = getattr(self, field)
            _check(
                field, count, count is None or 0 <= count <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"
            )
        stop = self.stop_token_ids
        good_stop = len(stop) <= MAX_STOP_TOKEN_IDS and all(t >= 0 for t in stop)
        _check(
            "stop_token_ids", stop, good_stop, f"at most {MAX_STOP_TOKEN_IDS} ids, none negative"
        )
        good_bias = len(self.logit_bias) <= MAX_LOGIT_BIAS and all(
            t >= 0 and math.isfinite(b) and abs(b) <= 100 for t, b in self.logit_bias.items()
        )
        _check(
            "logit_bias", self.logit_bias, good_bias, f"{MAX_LOGIT_BIAS} ids, biases -100 to 100"
        )
        seed = self.seed
        _check("seed", seed, seed is None or -(2**63) <= seed < 2**63, "a 64-bit integer")


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token under the model's own distribution (before temperature).

    rank: 1 for the most likely token. top: the most likely (token id, logprob), descending.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate, already tokenised and checked; `n` is fanned out before this."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # smaller runs first
    deadline_s: float | None = None  # time.time() after which the answer is of no use


class EngineTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one request inside the engine."""

    queued_s: float
    prefill_s: float
    decode_s: float


class EngineDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What one step (or several, merged) added to a request; the last has a finish_reason."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None  # one per token in token_ids
    prompt_logprobs: list[TokenLogprob | None] | None = None  # once, entry 0 is None
    num_cached_tokens: int = 0  # prompt tokens whose kv was reused
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the id that stopped it; that id is the last of token_ids
    error: str | None = None
    error_code: ErrorCode | None = None
    timing: EngineTiming | None = None  # with the last delta


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What fronts must know of the loaded model."""

    name: str
    model_type: str
    path: str
    vocab_size: int
    context_tokens: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    dtype: str
    device: str
    kv_blocks: int
    block_tokens: int
    notes: dict[str, str] = {}  # what was chosen and why: ISA, backend, tier sizes


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and counters of the engine since its start. experts: at most a second older."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    kv_bytes: int = 0  # memory of the kv blocks that may be used now
    prefix_cached_blocks: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    requests_finished: int = 0
    num_steps: int = 0
    step_s: float = 0.0
    extra: dict[str, float] = {}
    experts: ExpertStats | None = None
    memory: MemoryStats | None = None  # None: kv and experts share none
    pages: PageStats | None = None  # None: no weights are mapped


def unknown_fields(given: Mapping[str, object], known: set[str]) -> list[str]:
    """Names in `given` that are not known, sorted, for `did you mean` errors."""
    return sorted(set(given) - known)
