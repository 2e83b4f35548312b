"""Peers that send the ZeroMQ front what it cannot use: told so, and nobody else suffers."""

from __future__ import annotations

import asyncio
import random
import socket
from pathlib import Path
from typing import Any

import msgpack
from support.zmq_bodies import run, still_serves
from zmq_support import RawClient, Stack, echoed, text_of, until

from moeserve.config import ZmqConfig
from moeserve.framing import CLIENT_VERSION

BAD_SUBMITS: list[tuple[dict[str, Any], list[bytes], str, str | None]] = [
    ({"prompt": "a", "params": {"temperature": -1}}, [], "invalid_request", "temperature"),
    ({"prompt": "a", "params": {"temprature": 1}}, [], "invalid_request", "temprature"),
    ({"prompt": "a", "params": {"n": 1000000}}, [], "invalid_request", "n"),
    ({"prompt": "a", "params": {"max_tokens": "many"}}, [], "invalid_request", "max_tokens"),
    ({"prompt": ""}, [], "invalid_request", "prompt"),
    ({"prompt": "a", "token_ids": [1]}, [], "invalid_request", "token_ids"),
    ({}, [], "invalid_request", "prompt"),
    ({"token_ids": [1, 256]}, [], "invalid_request", "token_ids"),
    ({"token_ids": [1, -1]}, [], "invalid_request", "token_ids"),
    ({"prompt": "a", "model": "other"}, [], "model_not_found", "model"),
    ({"prompt": "a" * 100_001}, [], "context_length_exceeded", None),
    ({"prompt": "a", "credit": 0}, [], "invalid_request", "credit"),
    ({"prompt": "a", "credit": 2**40}, [], "invalid_request", "credit"),
    ({"prompt": "a", "deadline_ms": 0}, [], "invalid_request", "deadline_ms"),
    ({"token_frame": True}, [], "invalid_request", "token_frame"),
    ({"token_frame": True}, [b"abc"], "invalid_request", "token_frame"),
    ({"prompt": "a"}, [b"abcd"], "invalid_request", "token_frame"),
    ({"token_frame": True, "token_ids": [1]}, [b"abcd"], "invalid_request", "token_ids"),
    ({"prompt": 5}, [], "protocol_error", None),
    ({"prompt": "a", "promt": "b"}, [], "protocol_error", None),
    ({"messages": [{"role": "user"}]}, [], "protocol_error", None),
]


def test_every_bad_submit_gets_its_own_error(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            for number, (fields, raw, code, field) in enumerate(BAD_SUBMITS):
                request_id = f"bad-{number}"
                await client.send("submit", *raw, request_id=request_id, **fields)
                error = await client.receive()
                assert error["type"] == "error", (fields, error)
                assert error["request_id"] == request_id
                assert error["code"] == code, (fields, error)
                if field is not None:
                    assert error["field"] == field, (fields, error)
                    assert field in error["message"]
            await client.send("submit", request_id="x" * 129, prompt="a")
            assert (await client.receive())["field"] == "request_id"
            await still_serves(stack, client)

    run(body, tmp_path)


def test_other_versions_and_strangers_are_told(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.socket.send_multipart([b"MOESERVE/2", b"\x80"])
            error = await client.receive()
            assert error["code"] == "protocol_error"
            assert error["request_id"] is None
            assert "MOESERVE/2" in error["message"]
            assert "MOESERVE/1" in error["message"]
            await client.submit("early", "a")
            error = await client.receive()
            assert error["request_id"] == "early"
            assert "hello" in error["message"]
            await client.hello()
            await still_serves(stack, client)

    run(body, tmp_path)


def test_garbage_harms_nobody(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")

    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as good, RawClient(stack.endpoint) as bad:
            await good.hello()
            await bad.hello()
            await good.submit("r", "steady ", max_tokens=400)
            for _ in range(300):
                frames = [rng.randbytes(rng.randrange(60)) for _ in range(rng.randrange(1, 7))]
                if rng.random() < 0.5:
                    frames[0] = CLIENT_VERSION
                await bad.socket.send_multipart(frames)
            errors = await bad.received_before_pong()
            # Replies are dropped once the bad client's queue is full.
            assert errors
            assert {error["type"] for error in errors} == {"error"}
            assert text_of(await good.until_end("r")) == echoed("steady ", 400)
            await still_serves(stack, bad)

    run(body, tmp_path)


def zmtp_connection(path: str) -> socket.socket:
    """A raw peer that has finished the ZMTP 3.0 NULL handshake as a DEALER (RFC 23/ZMTP)."""
    raw = socket.socket(socket.AF_UNIX)
    raw.settimeout(120)
    raw.connect(path)
    raw.sendall(b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
    receive_exactly(raw, 64)
    ready = b"\x05READY" + b"\x0bSocket-Type" + b"\x00\x00\x00\x06DEALER"
    raw.sendall(b"\x04" + bytes([len(ready)]) + ready)
    size = receive_exactly(raw, 2)[1]
    assert b"READY" in receive_exactly(raw, size)
    return raw


def receive_exactly(raw: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = raw.recv(size - len(data))
        assert part, "the server closed the connection"
        data += part
    return data


def zmtp_frame(body: bytes, more: bool) -> bytes:
    return bytes([1 if more else 0, len(body)]) + body


def test_half_a_multipart_message(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        path = stack.endpoint.removeprefix("ipc://")
        submit = msgpack.packb({"type": "submit", "request_id": "half", "prompt": "x"})
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            for tail in (b"", zmtp_frame(submit, more=True), zmtp_frame(submit, more=True)[:9]):
                raw = await asyncio.to_thread(zmtp_connection, path)
                hello = msgpack.packb({"type": "hello"})
                raw.sendall(zmtp_frame(CLIENT_VERSION, more=True) + zmtp_frame(hello, more=False))
                await until(lambda: stack.front.num_sessions == 2)
                raw.sendall(zmtp_frame(CLIENT_VERSION, more=True) + tail)
                raw.close()
                await still_serves(stack, client)
                await until(lambda: stack.front.num_sessions == 1)
            assert stack.service.num_running == 0

    run(body, tmp_path, ZmqConfig(heartbeat_s=0.05, peer_timeout_s=100))


def test_too_large_messages(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client, RawClient(stack.endpoint) as bad:
            await client.hello()
            await bad.hello()
            # Two frames below the limit, together above it: refused, and the connection stays.
            await bad.send("hello", b"x" * 9000, client="y" * 9000)
            error = await bad.receive()
            assert error["code"] == "request_too_large"
            assert "10000" in error["message"]
            # One frame above it: ZeroMQ closes the connection before it reads the frame.
            await bad.send("hello", client="y" * 20_000)
            await until(lambda: stack.front.num_sessions == 1)
            await still_serves(stack, client)

    config = ZmqConfig(max_message_bytes=10_000, heartbeat_s=0.05, peer_timeout_s=100)
    run(body, tmp_path, config)
