"""The framing against msgpack as an oracle, and what the typed decoder refuses."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeserve.core import EngineDelta, ErrorCode, FinishReason, TokenLogprob
from moeserve.framing import (
    CLIENT_VERSION,
    MAX_DEPTH,
    MAX_ITEMS,
    ProtocolError,
    Wire,
    check_depth,
    client_server_wire,
    engine_side_wire,
    gateway_side_wire,
)
from moeserve.messages import (
    Cancel,
    Chunk,
    EngineOutput,
    EngineSubmit,
    Error,
    FromClient,
    Hello,
    Submit,
    ToClient,
    Usage,
    merge_deltas,
)

LIMIT = 5

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=300)
    | st.binary(max_size=300)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=20)
        | st.dictionaries(st.text(max_size=5) | st.integers(-5, 300), inner, max_size=20)
    ),
    max_leaves=40,
)


@st.composite
def nested(draw: st.DrawFn) -> Any:
    """A value wrapped in up to eight more levels, so that both sides of the limit are met."""
    value = draw(values)
    for kind in draw(st.lists(st.booleans(), max_size=8)):
        value = [value] if kind else {"k": value}
    return value


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Packed bytes, cut, extended or with some bytes changed."""
    packed = bytearray(msgpack.packb(draw(nested())))
    packed = packed[: draw(st.integers(0, len(packed)))] if draw(st.booleans()) else packed
    for _ in range(draw(st.integers(0, 3))):
        if packed:
            packed[draw(st.integers(0, len(packed) - 1))] = draw(st.integers(0, 255))
    return bytes(packed) + draw(st.binary(max_size=2))


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max((max(depth(k), depth(v)) for k, v in value.items()), default=0)
    if isinstance(value, (list, tuple)):
        return 1 + max(map(depth, value), default=0)
    return 0


class Pairs:
    """A map as msgpack's bytes have it: doubled keys and keys Python cannot hash included."""

    def __init__(self, items: list[tuple[Any, Any]]) -> None:
        self.items = items


def oracle_depth(value: Any) -> int:
    if isinstance(value, Pairs):
        return 1 + max((oracle_depth(part) for item in value.items for part in item), default=0)
    if isinstance(value, (msgpack.ExtType, msgpack.Timestamp)):
        return LIMIT + 1  # not allowed at all (asked first: an ExtType is a tuple too)
    if isinstance(value, tuple):
        return 1 + max(map(oracle_depth, value), default=0)
    return 0


def oracle_accepts(packed: bytes) -> bool:
    """What the msgpack library says of the same bytes."""
    try:
        value = msgpack.unpackb(
            packed, raw=True, use_list=False, strict_map_key=False, object_pairs_hook=Pairs
        )
    except (msgpack.UnpackException, ValueError):
        return False
    return oracle_depth(value) <= LIMIT


def accepts(packed: bytes) -> bool:
    try:
        check_depth(packed, limit=LIMIT)
    except ProtocolError:
        return False
    return True


@settings(max_examples=120)
@given(nested())
def test_depth_of_whole_values(value: Any) -> None:
    assert accepts(msgpack.packb(value)) == (depth(value) <= LIMIT)


@settings(max_examples=250)
@given(mutated() | st.binary(max_size=60))
@example(packed=b"\xd5\x00\x91\xc0")  # an extension
def test_damaged_bytes_against_the_library(packed: bytes) -> None:
    assert accepts(packed) == oracle_accepts(packed)


def test_limits_on_values() -> None:
    check_depth(msgpack.packb([0] * (MAX_ITEMS - 1)))
    with pytest.raises(ProtocolError, match="more than 65536 values"):
        check_depth(msgpack.packb([0] * MAX_ITEMS))
    with pytest.raises(ProtocolError, match="announces more values"):
        check_depth(b"\xdd\xff\xff\xff\xff\x00")
    with pytest.raises(ProtocolError, match=f"deeper than {MAX_DEPTH}"):
        check_depth(b"\x91" * 5_000_000)


@settings(max_examples=120)
@given(st.lists(mutated() | st.binary(max_size=40), max_size=6))
def test_decode_raises_nothing_but_protocol_errors(frames: list[bytes]) -> None:
    wire = client_server_wire(100_000)
    for parts in (frames, [CLIENT_VERSION, *frames]):
        with pytest.raises(ProtocolError):  # none of these is ever a valid message
            wire.decode(parts)


@settings(max_examples=120)
@given(
    st.sampled_from(["submit", "hello", "cancel", "credit", "ping", "pong", "done", "nothing"]),
    st.dictionaries(
        st.sampled_from(["request_id", "prompt", "params", "messages", "number", "chunks", "x"]),
        values,
        max_size=4,
    ),
)
def test_decode_of_maps_with_our_field_names(kind: str, fields: dict[str, Any]) -> None:
    wire = client_server_wire(100_000)
    frames = [CLIENT_VERSION, msgpack.packb({"type": kind, **fields})]
    try:
        outcome = wire.decode(frames)
    except ProtocolError as error:
        outcome = error
    if isinstance(outcome, ProtocolError):
        assert outcome.request_id in (fields.get("request_id"), None)
    else:
        assert outcome[0].__struct_config__.tag == kind
        assert outcome[1] == []


def decode_error(frames: list[bytes], max_bytes: int = 1000) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        client_server_wire(max_bytes).decode(frames)
    return caught.value


def test_refusals_say_what_is_wrong() -> None:
    hello = msgpack.packb({"type": "hello"})
    assert "b'MOESERVE/9'" in str(decode_error([b"MOESERVE/9", hello]))
    assert "1 frames" in str(decode_error([CLIENT_VERSION]))
    assert "5 frames" in str(decode_error([CLIENT_VERSION, hello, b"", b"", b""]))
    too_large = decode_error([CLIENT_VERSION, hello, b"x" * 1000])
    assert too_large.code is ErrorCode.TOO_LARGE
    assert "at most 1000" in str(too_large)
    invalid_text = b"\x82\xa4type\xa5hello\xa6client\xa2\xff\xfe"
    assert "utf-8" in str(decode_error([CLIENT_VERSION, invalid_text]))


def test_a_bad_submit_is_attributed_to_its_request() -> None:
    header = {"type": "submit", "request_id": "r1", "prompt": "x", "temprature": 1}
    error = decode_error([CLIENT_VERSION, msgpack.packb(header)])
    assert error.request_id == "r1"
    assert "temprature" in str(error)
    header = {"type": "submit", "request_id": "r2", "prompt": [1, 2]}
    error = decode_error([CLIENT_VERSION, msgpack.packb(header)])
    assert error.request_id == "r2"
    assert str(error) == "header: prompt: expected str | null, got array"


def test_a_direction_refuses_the_other_directions_messages() -> None:
    to_client = Wire(CLIENT_VERSION, ToClient, 1000)
    chunk = Chunk(request_id="a", index=0, text="x", token_ids=[1])
    frames = to_client.encode(chunk)
    assert to_client.decode(frames) == (chunk, [])
    with pytest.raises(ProtocolError):
        client_server_wire(1000).decode(frames)
    assert Wire(CLIENT_VERSION, FromClient, 1000).decode([CLIENT_VERSION, b"\x81\xa4type\xa5hello"])


def test_plain_msgpack_reads_what_we_write() -> None:
    error = Error(request_id=None, code=ErrorCode.INVALID, message="no", field="x")
    header = msgpack.unpackb(Wire(CLIENT_VERSION, ToClient, 1000).encode(error)[1])
    assert header["type"] == "error"
    assert header["code"] == "invalid_request"
    for message in (Hello(), Cancel(request_id="a"), Submit(request_id="a", prompt="b")):
        packed = msgpack.packb(msgspec.to_builtins(message))
        assert client_server_wire(1000).decode([CLIENT_VERSION, packed])[0] == message
    assert Usage(prompt_tokens=1, completion_tokens=2).cached_tokens == 0


def test_invalid_params_inside_an_engine_message() -> None:
    frames = engine_side_wire().encode(Hello())
    request = {"request_id": "a", "token_ids": [1], "params": {"temperature": -1}}
    frames[1] = msgpack.packb({"type": "engine_submit", "request": request})
    with pytest.raises(ProtocolError, match="temperature"):
        engine_side_wire().decode(frames)
    request["params"] = {"temperature": 0}
    frames[1] = msgpack.packb({"type": "engine_submit", "request": request})
    message, _ = engine_side_wire().decode(frames)
    assert isinstance(message, EngineSubmit)
    assert message.request.params.temperature == 0


def logprob(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=-0.5, rank=1, top=[(token_id, -0.5)])


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6), st.booleans())
def test_merged_deltas_hold_everything_in_order(tokens: list[list[int]], scored: bool) -> None:
    parts = [
        EngineDelta(
            request_id="r",
            token_ids=ids,
            logprobs=[logprob(i) for i in ids] if scored else None,
            prompt_logprobs=[None, logprob(7)] if number == 0 else None,
            num_cached_tokens=3 if number == 0 else 0,
            finish_reason=FinishReason.LENGTH if number == len(tokens) - 1 else None,
        )
        for number, ids in enumerate(tokens)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_deltas(merged, part)
    flat = [token for ids in tokens for token in ids]
    assert merged.token_ids == flat
    assert merged.logprobs == ([logprob(i) for i in flat] if scored else None)
    assert merged.prompt_logprobs == [None, logprob(7)]
    assert merged.num_cached_tokens == 3
    assert merged.finish_reason is FinishReason.LENGTH
    output = EngineOutput(epoch="e", deltas=[merged])
    assert gateway_side_wire().decode(gateway_side_wire().encode(output)) == (output, [])
