"""What the client hands out: chunks, results, errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ClientError(Exception):
    """Base of every error of this package.

    code: one of the error codes of docs/protocol.md, such as "invalid_request" or "overloaded".
    field: the request field at fault, if one is. hint: what to do about it.
    """

    def __init__(
        self, message: str, *, code: str, field: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message if hint is None or hint in message else f"{message} ({hint})")
        self.code = code
        self.field = field
        self.hint = hint


class ServerError(ClientError):
    """The server refused or ended the request; code, field and hint are its own."""


class ConnectionLost(ClientError):
    """The server went away, or never was there. Whatever was in flight is over; see AsyncClient."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, code="engine_unavailable", hint=hint)


class TimedOut(ClientError):
    """`timeout_s` has passed. A request that was running has been cancelled."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, code="deadline_exceeded", hint=hint)


@dataclass(frozen=True)
class Logprob:
    """One token with its log-probability.

    raw: its exact bytes, which need not be whole characters. logprob, rank: None for the first
    token of a prompt. top: (token id, text, logprob), most likely first.
    """

    token: str
    raw: bytes
    token_id: int
    logprob: float | None
    rank: int | None
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class Chunk:
    """More of answer `index`. A reader that falls behind gets fewer, longer chunks.

    finish_reason: with the last chunk of an answer: stop, length, cancelled, deadline or error.
    stop: the stop string or stop token id that ended it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] | None = None
    finish_reason: str | None = None
    stop: str | int | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens; cached_tokens of the prompt were reused from earlier requests."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds on the server. ttft_ms: from receipt to the first token."""

    queued_ms: float
    ttft_ms: float
    total_ms: float


@dataclass(frozen=True)
class Answer:
    """One whole answer; the fields are those of Chunk."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] | None
    finish_reason: str | None
    stop: str | int | None


def join_chunks(chunks: Sequence[Chunk]) -> Answer:
    """All chunks of one answer as one."""
    scored = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    return Answer(
        index=chunks[0].index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(one for part in scored for one in part) if scored else None,
        finish_reason=chunks[-1].finish_reason,
        stop=chunks[-1].stop,
    )


@dataclass(frozen=True)
class Result:
    """Everything a request gave: `n` answers, in order of their index."""

    answers: tuple[Answer, ...]
    usage: Usage
    timing: Timing
    prompt_logprobs: tuple[Logprob, ...] | None

    @property
    def text(self) -> str:
        """Of the first answer; as are token_ids and finish_reason."""
        return self.answers[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.answers[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.answers[0].finish_reason


@dataclass(frozen=True)
class ServerInfo:
    """What the server said in its welcome."""

    server: str
    models: tuple[str, ...]
    heartbeat_ms: int
    timeout_ms: int
    max_message_bytes: int
    max_in_flight: int
