"""Every wire message, typed, and the framing they travel in.

A message is a ZeroMQ multipart: frame 0 the protocol version, frame 1 a msgpack map whose `type`
names the message, further frames raw bytes that the header announces. docs/protocol.md describes
the client wire for people who write clients in other languages; the engine wire is private.

Decoding is strict: sizes, frame counts and nesting depth are limited before anything is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import msgspec

from moeserve.core import (
    EngineDelta,
    EngineRequest,
    EngineStats,
    ErrorCode,
    FinishReason,
    ModelInfo,
    MoeserveError,
)

CLIENT_VERSION: Final = b"MOESERVE/1"
ENGINE_VERSION: Final = b"MOESERVE-ENGINE/1"
MAX_FRAMES: Final = 4
MAX_DEPTH: Final = 16


class ProtocolError(MoeserveError):
    """A multipart message that is not a message of ours."""

    def __init__(self, message: str, **kwargs: Any) -> None:
        super().__init__(message, code=ErrorCode.PROTOCOL, **kwargs)


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all messages."""


# -- client → gateway -----------------------------------------------------------------------------


class Hello(Message, tag="hello"):
    """Opens a session; answered by Welcome. Sent again after a Pong from an unknown server."""

    client: str = ""  # name and version, for logs


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: str
    content: str


class Submit(Message, tag="submit", forbid_unknown_fields=True):
    """Asks for a generation. Exactly one of prompt, token_ids, messages, token_frame is given.

    token_frame: True when frame 2 holds the prompt as little-endian int32 token ids.
    params: fields of SamplingParams, plus `stop` (strings) and `n`.
    credit: chunks the server may send before it must wait for Credit.
    """

    request_id: str
    model: str | None = None
    prompt: str | None = None
    token_ids: list[int] | None = None
    messages: list[ChatMessage] | None = None
    token_frame: bool = False
    params: dict[str, Any] = {}
    priority: int = 0
    deadline_ms: int | None = None  # from receipt
    credit: int = 64


class Cancel(Message, tag="cancel"):
    request_id: str


class Credit(Message, tag="credit"):
    """Allows so many more chunks for a request."""

    request_id: str
    chunks: int


class Ping(Message, tag="ping"):
    """Either side may send it at any time; answered by Pong with the same number."""

    number: int = 0


# -- gateway → client -----------------------------------------------------------------------------


class Pong(Message, tag="pong"):
    """known: the server has a session for this client (False: say Hello again)."""

    number: int = 0
    known: bool = True


class Welcome(Message, tag="welcome"):
    server: str  # name and version
    models: list[str]
    heartbeat_ms: int
    timeout_ms: int
    max_message_bytes: int
    max_in_flight: int


class Accepted(Message, tag="accepted"):
    request_id: str
    prompt_tokens: int


class WireLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    token_id: int
    logprob: float
    top: list[tuple[int, str, float]] = []


class Chunk(Message, tag="chunk"):
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


class Done(Message, tag="done"):
    """The request is over; nothing follows with this request_id."""

    request_id: str
    usage: Usage
    timing: Timing
    prompt_logprobs: list[WireLogprob | None] | None = None


class Error(Message, tag="error"):
    """request_id None: about the connection or a message that could not be attributed."""

    request_id: str | None
    code: ErrorCode
    message: str
    field: str | None = None
    hint: str | None = None


# -- gateway → engine -----------------------------------------------------------------------------


class EngineSubmit(Message, tag="engine_submit"):
    request: EngineRequest


class EngineAbort(Message, tag="engine_abort"):
    """reason: CANCELLED (nobody reads on) or STOP (the front found a stop string)."""

    request_id: str
    reason: FinishReason = FinishReason.CANCELLED


class EngineShutdown(Message, tag="engine_shutdown"):
    pass


# -- engine → gateway -----------------------------------------------------------------------------


class EngineStatus(Message, tag="engine_status"):
    """Heartbeat and state. epoch: random per engine process, so a restart is noticed."""

    epoch: str
    stage: str  # "loading", "ready", "failed", "stopping"
    detail: str = ""
    progress: float = 0.0
    info: ModelInfo | None = None
    stats: EngineStats | None = None


class EngineOutput(Message, tag="engine_output"):
    epoch: str
    deltas: list[EngineDelta]


FromClient: TypeAlias = Hello | Submit | Cancel | Credit | Ping | Pong
ToClient: TypeAlias = Welcome | Accepted | Chunk | Done | Error | Ping | Pong
ToEngine: TypeAlias = EngineSubmit | EngineAbort | EngineShutdown | Ping
FromEngine: TypeAlias = EngineStatus | EngineOutput | Pong


def check_depth(packed: bytes | memoryview, limit: int = MAX_DEPTH) -> None:
    """Refuses msgpack nested deeper than `limit`, building no object and without recursion.

    Raises ProtocolError; also when the bytes end early or go on after the first object.
    """
    data = memoryview(packed)
    end = len(data)
    position = 0
    open_items = [1]  # items still to read on each level

    def length(at: int, size: int) -> int:
        if at + size > end:
            raise ProtocolError("header: msgpack ends early")
        return int.from_bytes(data[at : at + size], "big")

    while open_items:
        if open_items[-1] == 0:
            open_items.pop()
            continue
        open_items[-1] -= 1
        if position >= end:
            raise ProtocolError("header: msgpack ends early")
        tag = data[position]
        position += 1
        children = 0
        if tag <= 0x7F or tag >= 0xE0 or tag in (0xC0, 0xC2, 0xC3):
            pass
        elif tag <= 0x8F:
            children = 2 * (tag & 0x0F)
        elif tag <= 0x9F:
            children = tag & 0x0F
        elif tag <= 0xBF:
            position += tag & 0x1F
        elif tag in (0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB):  # bin and str, 8/16/32
            size = 1 << ((tag - 0xC4) if tag < 0xD0 else (tag - 0xD9))
            position += size + length(position, size)
        elif tag in (0xCA, 0xCB):
            position += 4 if tag == 0xCA else 8
        elif 0xCC <= tag <= 0xD3:
            position += 1 << ((tag - 0xCC) & 3)
        elif tag in (0xDC, 0xDD, 0xDE, 0xDF):  # array and map, 16/32
            size = 2 if tag in (0xDC, 0xDE) else 4
            children = length(position, size) * (2 if tag >= 0xDE else 1)
            position += size
        else:  # ext types and the never-used 0xC1
            raise ProtocolError(f"header: msgpack type 0x{tag:02x} is not allowed")
        if position > end:
            raise ProtocolError("header: msgpack ends early")
        if children:
            if children > end - position:  # every item takes at least one byte
                raise ProtocolError("header: msgpack announces more items than it holds")
            open_items.append(children)
            if len(open_items) - 1 > limit:
                raise ProtocolError(f"header: nested deeper than {limit} levels")
    if position != end:
        raise ProtocolError("header: bytes after the end of the message")


class Wire:
    """Encodes and decodes the messages of one direction pair under one version string."""

    def __init__(self, version: bytes, incoming: Any, max_bytes: int) -> None:
        self.version = version
        self.max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(incoming)

    def encode(self, message: Message, *raw: bytes) -> list[bytes]:
        return [self.version, self._encoder.encode(message), *raw]

    def decode(self, frames: Sequence[bytes]) -> tuple[Any, list[bytes]]:
        """The typed message and its raw frames. Raises ProtocolError with what is wrong."""
        if not 2 <= len(frames) <= MAX_FRAMES:
            raise ProtocolError(f"message: {len(frames)} frames, expected 2 to {MAX_FRAMES}")
        if frames[0] != self.version:
            got = bytes(frames[0][:32])
            raise ProtocolError(f"version: got {got!r}, this server speaks {self.version!r}")
        total_bytes = sum(map(len, frames))
        if total_bytes > self.max_bytes:
            raise ProtocolError(f"message: {total_bytes} bytes, at most {self.max_bytes}")
        check_depth(frames[1])
        try:
            message = self._decoder.decode(frames[1])
        except (msgspec.DecodeError, RecursionError) as error:
            raise ProtocolError(f"header: {error}") from error
        return message, list(frames[2:])


def client_server_wire(max_bytes: int) -> Wire:
    """The gateway's side of the client wire."""
    return Wire(CLIENT_VERSION, FromClient, max_bytes)


ENGINE_MAX_BYTES: Final = 1 << 30


def engine_side_wire() -> Wire:
    return Wire(ENGINE_VERSION, ToEngine, ENGINE_MAX_BYTES)


def gateway_side_wire() -> Wire:
    return Wire(ENGINE_VERSION, FromEngine, ENGINE_MAX_BYTES)
