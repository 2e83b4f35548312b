"""How messages travel: the frames of one ZeroMQ multipart, and the limits checked on arrival.

Frame 0 is the protocol version, frame 1 a msgpack map whose `type` names the message, further
frames are raw bytes that the header announces. Decoding is strict: bytes, frames, values and
nesting depth are limited before anything is built.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from moeserve.control_messages import (
    ControlRequest,
    EngineAnswer,
    EngineControl,
    EngineControlEnd,
)
from moeserve.core import ErrorCode, MoeserveError
from moeserve.messages import FromClient, FromEngine, Message, ToEngine

CLIENT_VERSION: Final = b"MOESERVE/1"
ENGINE_VERSION: Final = b"MOESERVE-ENGINE/1"
MAX_FRAMES: Final = 4
MAX_DEPTH: Final = 16
#: items of one header; longer prompts as token ids travel in a raw frame
MAX_ITEMS: Final = 65_536


class ProtocolError(MoeserveError):
    """A multipart message that is not a message of ours."""

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode = ErrorCode.PROTOCOL,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.request_id = request_id


_SHORT: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # bin and str: length bytes
_FIXED: Final = {
    **dict.fromkeys((0xC0, 0xC2, 0xC3), 0),  # nil, false, true
    **dict.fromkeys((0xCC, 0xD0), 1),  # integers and floats of 8, 16, 32, 64 bits
    **dict.fromkeys((0xCD, 0xD1), 2),
    **dict.fromkeys((0xCE, 0xD2, 0xCA), 4),
    **dict.fromkeys((0xCF, 0xD3, 0xCB), 8),
}
_NESTED: Final = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # array and map


def check_depth(
    packed: bytes | memoryview, limit: int = MAX_DEPTH, max_items: int = MAX_ITEMS
) -> None:
    """Refuses msgpack nested deeper than `limit`, building no object and without recursion.

    Raises ProtocolError; also for more than `max_items` values, extension types, and when the
    bytes end early or go on after the first object. (https://github.com/msgpack/msgpack spec.md)
    """
    end = len(packed)
    position = 0
    num_items = 0
    open_items = [1]  # values still to read on each open level

    while open_items:
        if open_items[-1] == 0:
            open_items.pop()
            continue
        open_items[-1] -= 1
        num_items += 1
        if num_items > max_items:
            raise ProtocolError(f"header: more than {max_items} values")
        if position >= end:
            raise ProtocolError("header: msgpack ends early")
        position, children = _read_tag(packed, position)
        if position > end:
            raise ProtocolError("header: msgpack ends early")
        if children is not None:
            if children > end - position:  # every value takes at least one byte
                raise ProtocolError("header: msgpack announces more values than it holds")
            open_items.append(children)
            if len(open_items) - 1 > limit:
                raise ProtocolError(f"header: nested deeper than {limit} levels")
    if position != end:
        raise ProtocolError("header: bytes after the end of the message")


def _read_tag(packed: bytes | memoryview, position: int) -> tuple[int, int | None]:
    """Where a scalar ends, None; or where an array's or map's values begin, and how many."""
    tag = packed[position]
    position += 1
    if tag <= 0x7F or tag >= 0xE0:  # small integers
        return position, None
    if tag <= 0x8F:
        return position, 2 * (tag & 0x0F)
    if tag <= 0x9F:
        return position, tag & 0x0F
    if tag <= 0xBF:
        return position + (tag & 0x1F), None
    if tag in _FIXED:
        return position + _FIXED[tag], None
    # A length cut short reads as a smaller number; the position beyond the end tells.
    if tag in _SHORT:
        size = _SHORT[tag]
        return position + size + int.from_bytes(packed[position : position + size], "big"), None
    if tag in _NESTED:
        size, values = _NESTED[tag]
        count = int.from_bytes(packed[position : position + size], "big")
        return position + size, values * count
    raise ProtocolError(f"header: msgpack type 0x{tag:02x} is not allowed")


class _Attribution(msgspec.Struct, frozen=True):
    """The one field that lets an error find its request."""

    request_id: str | None = None


class Wire:
    """Encodes and decodes the messages of one direction pair under one version string.

    max_items: values one header may hold; None leaves items and depth to the message types, for a
    peer that is our own process.
    """

    def __init__(
        self, version: bytes, incoming: Any, max_bytes: int, max_items: int | None = MAX_ITEMS
    ) -> None:
        self.version = version
        self.max_bytes = max_bytes
        self._max_items = max_items
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(incoming)
        self._attribution = msgspec.msgpack.Decoder(_Attribution)

    def encode(self, message: Message, *raw: bytes) -> list[bytes]:
        return [self.version, self._encoder.encode(message), *raw]

    def decode(self, frames: Sequence[bytes]) -> tuple[Any, list[bytes]]:
        """The typed message and its raw frames.

        Raises ProtocolError with what is wrong; its request_id names the request when the header
        still says which.
        """
        if not 2 <= len(frames) <= MAX_FRAMES:
            raise ProtocolError(f"message: {len(frames)} frames, expected 2 to {MAX_FRAMES}")
        if frames[0] != self.version:
            got = bytes(frames[0][:32])
            raise ProtocolError(f"version: got {got!r}, this side speaks {self.version!r}")
        total_bytes = sum(map(len, frames))
        if total_bytes > self.max_bytes:
            raise ProtocolError(
                f"message: {total_bytes} bytes, at most {self.max_bytes}", code=ErrorCode.TOO_LARGE
            )
        if self._max_items is not None:
            check_depth(frames[1], max_items=self._max_items)
        try:
            message = self._decoder.decode(frames[1])
        except msgspec.ValidationError as error:
            _, problem = field_first(str(error))
            raise ProtocolError(
                f"header: {problem}", request_id=self._attribute(frames[1])
            ) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, MoeserveError) as error:
            raise ProtocolError(
                f"header: {error}", request_id=self._attribute(frames[1])
            ) from error
        return message, list(frames[2:])

    def _attribute(self, header: bytes) -> str | None:
        try:
            return self._attribution.decode(header).request_id
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None


def field_first(problem: str) -> tuple[str | None, str]:
    """msgspec's "Expected `int`, got `str` - at `$.max_tokens`" as our errors have it: the field at
    fault, if one is, and "max_tokens: expected int, got str". A missing one is at fault itself.
    """
    what, _, path = problem.partition(" - at `$")
    field = path.rstrip("`").removeprefix(".").replace("[...]", "") or None
    if missing := re.fullmatch("Object missing required field `([^`]*)`", what):
        name = f"{field}.{missing[1]}" if field else missing[1]
        return name, f"{name}: it is required"
    text = (what[:1].lower() + what[1:]).replace("`", "")
    return field, f"{field}: {text}" if field else text


def client_server_wire(max_bytes: int) -> Wire:
    """The gateway's side of the client wire."""
    return Wire(CLIENT_VERSION, FromClient | ControlRequest, max_bytes)


ENGINE_MAX_BYTES: Final = 1 << 30


def engine_side_wire() -> Wire:
    incoming = ToEngine | EngineControl | EngineControlEnd
    return Wire(ENGINE_VERSION, incoming, ENGINE_MAX_BYTES, max_items=None)


def gateway_side_wire() -> Wire:
    incoming = FromEngine | EngineAnswer
    return Wire(ENGINE_VERSION, incoming, ENGINE_MAX_BYTES, max_items=None)
