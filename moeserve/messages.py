"""Every wire message, typed. moeserve.framing says how they travel.

docs/protocol.md describes the client wire for people who write clients in other languages; the
engine wire, between our own two processes, is private.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import msgspec

from moeserve.core import (
    EngineDelta,
    EngineRequest,
    EngineStats,
    ErrorCode,
    FinishReason,
    ModelInfo,
)

MAX_REQUEST_ID_CHARS: Final = 128
MAX_CREDIT: Final = 1_000_000


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all messages."""


# -- client → gateway -----------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """Opens a session; answered by Welcome. Sent again after a Pong from an unknown server."""

    client: str = ""  # name and version, for logs


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: str
    content: str


class Submit(Message, frozen=True, kw_only=True, tag="submit", forbid_unknown_fields=True):
    """Asks for a generation. Exactly one of prompt, token_ids, messages, token_frame is given.

    token_frame: True when frame 2 holds the prompt as little-endian int32 token ids.
    params: fields of SamplingParams, plus `n`, `stop`, `include_stop`, `skip_special_tokens`.
    template_variables: more variables for the chat template; messages only.
    credit: chunks the server may send before it must wait for Credit.
    """

    request_id: str
    model: str | None = None
    prompt: str | None = None
    token_ids: list[int] | None = None
    messages: list[ChatMessage] | None = None
    token_frame: bool = False
    params: dict[str, Any] = {}
    template_variables: dict[str, Any] = {}
    add_special_tokens: bool = True
    priority: int = 0
    deadline_ms: int | None = None  # from receipt
    credit: int = 64


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    request_id: str


class Credit(Message, frozen=True, kw_only=True, tag="credit"):
    """Allows so many more chunks for a request."""

    request_id: str
    chunks: int


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Either side may send it at any time; answered by Pong with the same number."""

    number: int = 0


# -- gateway → client -----------------------------------------------------------------------------


class Pong(Message, frozen=True, kw_only=True, tag="pong"):
    """known: the server has a session for this client (False: say Hello again)."""

    number: int = 0
    known: bool = True


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    server: str  # name and version
    models: list[str]
    heartbeat_ms: int
    timeout_ms: int
    max_message_bytes: int
    max_in_flight: int


class Accepted(Message, frozen=True, kw_only=True, tag="accepted"):
    request_id: str
    prompt_tokens: int


class WireLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One token. raw: its exact bytes, which need not be whole characters.

    logprob, rank: None for the first token of a prompt, which nothing predicts.
    top: (token id, text, logprob), most likely first.
    """

    token: str
    raw: bytes
    token_id: int
    logprob: float | None
    rank: int | None = None
    top: list[tuple[int, str, float]] = []


class Chunk(Message, frozen=True, kw_only=True, tag="chunk"):
    """More of answer `index`. A slow reader gets fewer, longer chunks, never lost text."""

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[WireLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop: str | int | None = None  # the stop string or token id that ended it


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds. ttft_ms: from receipt to the first token."""

    queued_ms: float
    ttft_ms: float
    total_ms: float


class Done(Message, frozen=True, kw_only=True, tag="done"):
    """The request is over; nothing follows with this request_id."""

    request_id: str
    usage: Usage
    timing: Timing
    prompt_logprobs: list[WireLogprob] | None = None


class Error(Message, frozen=True, kw_only=True, tag="error"):
    """request_id None: about the connection or a message that could not be attributed."""

    request_id: str | None
    code: ErrorCode
    message: str
    field: str | None = None
    hint: str | None = None


# -- gateway → engine -----------------------------------------------------------------------------


class EngineSubmit(Message, frozen=True, kw_only=True, tag="engine_submit"):
    request: EngineRequest


class EngineAbort(Message, frozen=True, kw_only=True, tag="engine_abort"):
    """reason: CANCELLED (nobody reads on) or STOP (the front found a stop string)."""

    request_id: str
    reason: FinishReason = FinishReason.CANCELLED


class EngineShutdown(Message, frozen=True, kw_only=True, tag="engine_shutdown"):
    pass


# -- engine → gateway -----------------------------------------------------------------------------


class EngineStatus(Message, frozen=True, kw_only=True, tag="engine_status"):
    """Heartbeat and state. epoch: random per engine process, so a restart is noticed. trouble: why
    requests fail although the stage is ready."""

    epoch: str
    stage: str  # "loading", "ready", "failed", "stopping"
    detail: str = ""
    trouble: str = ""
    progress: float = 0.0
    info: ModelInfo | None = None
    stats: EngineStats | None = None


class EngineOutput(Message, frozen=True, kw_only=True, tag="engine_output"):
    epoch: str
    deltas: list[EngineDelta]


FromClient: TypeAlias = Hello | Submit | Cancel | Credit | Ping | Pong
ToClient: TypeAlias = Welcome | Accepted | Chunk | Done | Error | Ping | Pong
ToEngine: TypeAlias = EngineSubmit | EngineAbort | EngineShutdown | Ping
FromEngine: TypeAlias = EngineStatus | EngineOutput | Pong


def merge_deltas(first: EngineDelta, then: EngineDelta) -> EngineDelta:
    """Both deltas as one: what a reader gets who was away while `then` arrived."""
    if first.logprobs is None or then.logprobs is None:
        logprobs = first.logprobs or then.logprobs
    else:
        logprobs = first.logprobs + then.logprobs
    prompt = first.prompt_logprobs if then.prompt_logprobs is None else then.prompt_logprobs
    return msgspec.structs.replace(
        then,
        token_ids=first.token_ids + then.token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt,
        num_cached_tokens=max(first.num_cached_tokens, then.num_cached_tokens),
    )
