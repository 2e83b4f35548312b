"""One client of the ZeroMQ front: its requests, its credit, and the messages made for it."""

from __future__ import annotations

import array
import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from moeserve.config import ZmqConfig
from moeserve.core import ErrorCode, MoeserveError, RequestError
from moeserve.gateway.service import Generation
from moeserve.gateway.zmq_control import ActiveControl
from moeserve.messages import (
    MAX_CREDIT,
    MAX_REQUEST_ID_CHARS,
    Chunk,
    Done,
    Error,
    Submit,
    Welcome,
    WireLogprob,
)
from moeserve.text.events import TextEvent, TokenText
from moeserve.text.request import GenerateRequest


class CreditGate:
    """Chunks a client still allows. One task takes, the receive loop adds."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._lifted = False
        self._changed = asyncio.Event()

    async def take(self) -> None:
        """Waits until one more chunk may be sent."""
        while self._chunks == 0 and not self._lifted:
            self._changed.clear()
            await self._changed.wait()
        if not self._lifted:
            self._chunks -= 1

    def add(self, chunks: int) -> None:
        self._chunks = min(self._chunks + chunks, MAX_CREDIT)
        self._changed.set()

    def lift(self) -> None:
        """No limit any more: the request ends, and what is left is little."""
        self._lifted = True
        self._changed.set()


@dataclass
class ActiveRequest:
    """One request of a session, from its submit to its last message."""

    request_id: str
    credit: CreditGate
    task: asyncio.Task[None] | None = None
    generation: Generation | None = None
    cancelled: bool = False

    def started(self, generation: Generation) -> None:
        self.generation = generation
        if self.cancelled:  # while its prompt was being prepared
            generation.cancel()

    def cancel(self) -> None:
        """The client wants no more; it still gets what is there, and `done`."""
        self.cancelled = True
        self.credit.lift()
        if self.generation is not None:
            self.generation.cancel()


@dataclass
class Session:
    """A client that has said hello, under the routing id of its connection.

    silent_beats: heartbeats since it was last heard. blocked_beats: heartbeats in a row at which
    its outgoing queue was full.
    """

    peer: bytes
    number: int
    requests: dict[str, ActiveRequest | ActiveControl] = field(default_factory=dict)
    silent_beats: int = 0
    blocked_beats: int = 0


class LimitedLog:
    """Warnings that a hostile peer could cause at will: a few per period, the rest is counted."""

    def __init__(self, log: logging.Logger, per_period: int = 5, period_s: float = 10.0) -> None:
        self._log = log
        self._per_period = per_period
        self._period_s = period_s
        self._period_start_s = float("-inf")
        self._num_logged = 0
        self._num_dropped = 0

    def warning(self, text: str, *values: object) -> None:
        now_s = time.monotonic()
        if now_s - self._period_start_s > self._period_s:
            if self._num_dropped:
                self._log.warning("zmq: %d more warnings were not logged", self._num_dropped)
            self._period_start_s, self._num_logged, self._num_dropped = now_s, 0, 0
        if self._num_logged < self._per_period:
            self._num_logged += 1
            self._log.warning(text, *values)
        else:
            self._num_dropped += 1


def check_request_id(session: Session, request_id: str, max_in_flight: int) -> None:
    """Raises RequestError for an id that is no good, and for one request too many."""
    length = len(request_id)
    if not 1 <= length <= MAX_REQUEST_ID_CHARS:
        raise RequestError(
            f"request_id: {length} characters; allowed: 1 to {MAX_REQUEST_ID_CHARS}",
            field="request_id",
        )
    if request_id in session.requests:
        raise RequestError(
            f"request_id: {request_id!r} is still running",
            field="request_id",
            hint="use a new id for every request",
        )
    if len(session.requests) >= max_in_flight:
        raise RequestError(
            f"{max_in_flight} requests of this client are in flight already",
            code=ErrorCode.OVERLOADED,
            hint="wait for some to end",
        )


def check_submit(session: Session, submit: Submit, max_in_flight: int) -> None:
    """Raises RequestError for what this wire adds to a request; the service checks the rest."""
    check_request_id(session, submit.request_id, max_in_flight)
    check_credit("credit", submit.credit)
    if submit.deadline_ms is not None and submit.deadline_ms <= 0:
        raise RequestError(f"deadline_ms: {submit.deadline_ms} is not above 0", field="deadline_ms")


def check_credit(name: str, chunks: int) -> None:
    if not 1 <= chunks <= MAX_CREDIT:
        raise RequestError(
            f"{name}: {chunks} is out of range; allowed: 1 to {MAX_CREDIT}", field=name
        )


def generate_request(submit: Submit, raw: Sequence[bytes], request_id: str) -> GenerateRequest:
    """The request for the service; its id is unique in the server, the client's need not be.

    Raises RequestError when frames and header contradict each other.
    """
    received_s = time.monotonic()
    if len(raw) != (1 if submit.token_frame else 0):
        raise RequestError(
            f"token_frame: {str(submit.token_frame).lower()}, but {len(raw)} raw frames came",
            field="token_frame",
        )
    token_ids = submit.token_ids
    if submit.token_frame:
        if token_ids is not None:
            raise RequestError("token_ids: given twice, here and in a frame", field="token_ids")
        token_ids = unpack_token_ids(raw[0])
    deadline_ms = submit.deadline_ms
    return GenerateRequest(
        request_id=request_id,
        model=submit.model,
        prompt=submit.prompt,
        token_ids=token_ids,
        messages=None if submit.messages is None else msgspec.to_builtins(submit.messages),
        params=submit.params,
        template_variables=submit.template_variables,
        add_special_tokens=submit.add_special_tokens,
        priority=submit.priority,
        deadline_s=None if deadline_ms is None else time.time() + deadline_ms / 1000,
        received_s=received_s,
    )


def unpack_token_ids(frame: bytes) -> list[int]:
    """Little-endian int32, 4 bytes each."""
    if len(frame) % 4:
        raise RequestError(
            f"token_frame: {len(frame)} bytes is no whole number of int32", field="token_frame"
        )
    ids = array.array("i", frame)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def welcome_message(config: ZmqConfig, server: str, models: list[str]) -> Welcome:
    """server: name and version."""
    return Welcome(
        server=server,
        models=models,
        heartbeat_ms=round(config.heartbeat_s * 1000),
        timeout_ms=round(config.peer_timeout_s * 1000),
        max_message_bytes=config.max_message_bytes,
        max_in_flight=config.max_in_flight,
    )


def chunk_message(request_id: str, event: TextEvent) -> Chunk:
    return Chunk(
        request_id=request_id,
        index=event.index,
        text=event.text,
        token_ids=list(event.token_ids),
        logprobs=_logprobs(event.logprobs),
        finish_reason=event.finish_reason,
        stop=event.stop,
    )


def done_message(request_id: str, generation: Generation) -> Done:
    return Done(
        request_id=request_id,
        usage=generation.usage,
        timing=generation.timing,
        prompt_logprobs=_logprobs(generation.prompt_logprobs),
    )


def error_message(request_id: str | None, error: MoeserveError) -> Error:
    return Error(
        request_id=request_id,
        code=error.code,
        message=str(error),
        field=error.field,
        hint=error.hint,
    )


def _logprobs(tokens: Sequence[TokenText] | None) -> list[WireLogprob] | None:
    if tokens is None:
        return None
    return [
        WireLogprob(
            token=token.text,
            raw=token.raw,
            token_id=token.token_id,
            logprob=token.logprob,
            rank=token.rank,
            top=[(top.token_id, top.text, top.logprob) for top in token.top],
        )
        for token in tokens
    ]
