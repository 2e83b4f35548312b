"""The client's half of docs/protocol.md: frames out, frames in. Needs msgpack and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgpack

from moeserve.client.types import Chunk, ClientError, Logprob, ServerInfo, Timing, Usage

VERSION = b"MOESERVE/1"
Header = dict[str, Any]


def encode(kind: str, *raw: bytes, **fields: Any) -> list[bytes]:
    """The frames of one message. Fields that are None are left out: absent means default.

    Raises ClientError for values msgpack cannot carry.
    """
    header = {"type": kind, **{k: v for k, v in fields.items() if v is not None}}
    try:
        return [VERSION, msgpack.packb(header), *raw]
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise ClientError(
            f"{kind}: a text has {half} at character {error.start}, half of a surrogate pair",
            code="invalid_request",
            hint="send whole characters; text that is read must be UTF-8",
        ) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ClientError(f"{kind}: cannot be sent: {error}", code="invalid_request") from error


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Little-endian int32, 4 bytes each. Raises ClientError for anything that is no token id."""
    try:
        return struct.pack(f"<{len(token_ids)}i", *token_ids)
    except (struct.error, TypeError) as error:
        raise ClientError(
            f"token_ids: {error}; allowed: a sequence of integers below 2**31",
            code="invalid_request",
            field="token_ids",
        ) from error


def decode(frames: Sequence[bytes]) -> Header:
    """The header of a message. Raises ClientError(protocol_error)."""
    if len(frames) < 2:
        raise _not_ours(f"{len(frames)} frames")
    if frames[0] != VERSION:
        raise _not_ours(f"version {bytes(frames[0][:32])!r}, this client speaks {VERSION!r}")
    try:
        header = msgpack.unpackb(frames[1], strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise _not_ours(f"header: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("type"), str):
        raise _not_ours("header: no map with a `type`")
    return header


def raw_frames(frames: Sequence[bytes]) -> list[bytes]:
    """What follows the header of a message."""
    return list(frames[2:])


def _not_ours(what: str) -> ClientError:
    return ClientError(f"not a message of this protocol: {what}", code="protocol_error")


def read_chunk(header: Header) -> Chunk:
    return Chunk(
        index=header["index"],
        text=header["text"],
        token_ids=tuple(header["token_ids"]),
        logprobs=_logprobs(header.get("logprobs")),
        finish_reason=header.get("finish_reason"),
        stop=header.get("stop"),
    )


def read_done(header: Header) -> tuple[Usage, Timing, tuple[Logprob, ...] | None]:
    usage, timing = header["usage"], header["timing"]
    return (
        Usage(usage["prompt_tokens"], usage["completion_tokens"], usage["cached_tokens"]),
        Timing(timing["queued_ms"], timing["ttft_ms"], timing["total_ms"]),
        _logprobs(header.get("prompt_logprobs")),
    )


def read_welcome(header: Header) -> ServerInfo:
    return ServerInfo(
        server=header["server"],
        models=tuple(header["models"]),
        heartbeat_ms=header["heartbeat_ms"],
        timeout_ms=header["timeout_ms"],
        max_message_bytes=header["max_message_bytes"],
        max_in_flight=header["max_in_flight"],
    )


def _logprobs(given: list[Header] | None) -> tuple[Logprob, ...] | None:
    if given is None:
        return None
    return tuple(
        Logprob(
            token=one["token"],
            raw=one["raw"],
            token_id=one["token_id"],
            logprob=one["logprob"],
            rank=one["rank"],
            top=tuple((token_id, text, logprob) for token_id, text, logprob in one["top"]),
        )
        for one in given
    )


def check_prompt(prompt: object) -> None:
    """ClientError where a prompt is neither a text nor None: other kinds have their own names."""
    if prompt is not None and not isinstance(prompt, str):
        raise ClientError(
            f"prompt: expected a text, got {type(prompt).__name__}",
            code="invalid_request",
            field="prompt",
            hint="send tokens as token_ids=, a conversation as messages=",
        )
