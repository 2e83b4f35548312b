"""Reading a JSON request body into a checked struct, with errors that name the field and the fix.

A field that would change the answer and is not implemented is refused by name; an unknown field is
refused with the nearest known one. Nothing a client sends is silently ignored.
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Mapping
from email.message import Message as MailMessage
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from moeserve.core import unknown_fields
from moeserve.framing import field_first
from moeserve.gateway.errors import CLIENT_CLOSED_REQUEST, ApiError, invalid

MAX_JSON_DEPTH: Final = 16
#: integers beyond that are no count, id or seed, and have no place on our own wires
MAX_INTEGER: Final = 2**63
#: a first half without a second one behind it, or a second one without a first one before it
HALF_SURROGATE: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)

T = TypeVar("T", bound=msgspec.Struct)

#: field -> the values that mean "not used" (null always does)
Unimplemented = Mapping[str, tuple[object, ...]]


async def read_json(request: Request, kind: type[T], unimplemented: Unimplemented) -> T:
    """The request's body as `kind`. Raises ApiError saying what is wrong and where."""
    check_content_type(request.headers.get("content-type"))
    check_encoding(request.headers.get("content-encoding"))
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client left while sending") from error
    return to_struct(decode(body), kind, unimplemented)


def check_content_type(content_type: str | None) -> None:
    """Only application/json: a web page may send other types to a local server unasked.

    Browsers ask no permission (CORS preflight) for text/plain or form bodies.
    """
    header = MailMessage()
    header["content-type"] = content_type or ""
    if content_type is None or header.get_content_type() != "application/json":
        raise ApiError(
            415,
            f"content-type: {content_type!r} is not supported; send application/json",
            code="unsupported_media_type",
        )
    charset = header.get_content_charset("utf-8")
    if charset not in ("utf-8", "utf8"):
        raise ApiError(
            415,
            f"content-type: charset {charset!r} is not supported; send JSON as UTF-8",
            code="unsupported_media_type",
        )


def check_encoding(content_encoding: str | None) -> None:
    """Bodies come as they are: nothing is unpacked, so none grows beyond the limit of its size."""
    if content_encoding is not None and content_encoding.lower() != "identity":
        raise ApiError(
            415,
            f"content-encoding: {content_encoding[:64]!r} is not supported; send the body as it is",
            code="unsupported_media_type",
        )


def decode(body: bytes) -> dict[str, Any]:
    """A JSON object from bytes. NaN, Infinity, deep nesting and huge integers are refused."""
    if not body:
        raise invalid("body: it is empty; send a JSON object")
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise invalid(f"body: not valid UTF-8 ({error.reason})") from error
    except RecursionError as error:
        raise invalid(f"body: JSON nested deeper than {MAX_JSON_DEPTH} levels") from error
    except msgspec.DecodeError as error:
        raise invalid(f"body: not valid JSON: {error}{_hint(body)}") from error
    if not isinstance(value, dict):
        raise invalid(f"body: expected a JSON object, got {type(value).__name__}")
    for name, field in value.items():
        _check_field(name[:64], field)
    return value


def _hint(body: bytes) -> str:
    """What the decoder's own words do not say."""
    if body.startswith(codecs.BOM_UTF8):
        return "; send it without the byte order mark"
    if HALF_SURROGATE.search(body):
        return "; \\ud800 to \\udfff are halves of a character, and come in pairs"
    return ""


def _check_field(name: str, value: Any) -> None:
    """Refuses deep nesting and huge integers, level by level and without recursion."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        if any(isinstance(item, int) and not -MAX_INTEGER <= item < MAX_INTEGER for item in level):
            raise invalid(
                f"{name}: an integer beyond 64 bits; allowed: {-MAX_INTEGER} to {MAX_INTEGER - 1}",
                name,
            )
        outer = [item for item in level if isinstance(item, (dict, list))]
        if not outer:
            return
        level = []
        for item in outer:
            level.extend(item.values() if isinstance(item, dict) else item)
    raise invalid(f"{name}: JSON nested deeper than {MAX_JSON_DEPTH} levels", name)


def to_struct(fields: dict[str, Any], kind: type[T], unimplemented: Unimplemented) -> T:
    """Checks names, then types. Raises ApiError naming the field."""
    given = without_unimplemented(fields, unimplemented)
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    for name in unknown_fields(given, known):
        raise _unknown(name, known)
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        field, problem = field_first(str(error))
        raise ApiError(400, problem, param=field, code="invalid_type") from error


def without_unimplemented(
    fields: Mapping[str, Any], unimplemented: Unimplemented, where: str = ""
) -> dict[str, Any]:
    """`fields` less those that are not implemented and not used either."""
    kept = {}
    for name, value in fields.items():
        if name not in unimplemented:
            kept[name] = value
            continue
        neutral = unimplemented[name]
        if value is not None and value not in neutral:
            allowed = " or ".join(msgspec.json.encode(v).decode() for v in (None, *neutral))
            raise ApiError(
                400,
                f"{where}{name}: not implemented by this server; leave it out (or send {allowed})",
                param=f"{where}{name}",
                code="unsupported_parameter",
            )
    return kept


def _unknown(name: str, known: set[str]) -> ApiError:
    close = difflib.get_close_matches(name[:64], known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
    return ApiError(
        400, f"{name[:64]!r}: unknown field ({hint})", param=name[:64], code="unknown_parameter"
    )
