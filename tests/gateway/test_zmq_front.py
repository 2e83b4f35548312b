"""The ZeroMQ front over real sockets, spoken to message by message."""

from __future__ import annotations

import asyncio
import math
import random
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from zmq_support import RawClient, Stack, echoed, running_stack, text_of, until

from moeserve.config import ZmqConfig
from moeserve.framing import CLIENT_VERSION
from moeserve.gateway import lasting_task, zmq_front
from moeserve.gateway.zmq_send import Sent, try_send

Body = Callable[[Stack], Awaitable[None]]


def run(body: Body, directory: Path, config: ZmqConfig | None = None) -> None:
    async def main() -> None:
        async with running_stack(directory, config) as stack:
            await body(stack)

    asyncio.run(asyncio.wait_for(main(), 200))


async def still_serves(stack: Stack, client: RawClient, request_id: str = "after") -> None:
    await client.submit(request_id, "alive ", max_tokens=12)
    messages = await client.until_end(request_id)
    assert messages[-1]["type"] == "done"
    assert text_of(messages) == echoed("alive ", 12)


def test_session_and_one_request(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.send("ping", number=3)
            assert await client.receive() == {"type": "pong", "number": 3, "known": False}
            welcome = await client.hello()
            assert welcome["models"] == ["echo"]
            assert welcome["max_in_flight"] == 256
            await client.send("ping", number=4)
            assert await client.receive() == {"type": "pong", "number": 4, "known": True}
            await client.submit("r", "abc", max_tokens=7)
            accepted, *chunks, done = await client.until_end("r")
            assert accepted == {"type": "accepted", "request_id": "r", "prompt_tokens": 3}
            assert "".join(chunk["text"] for chunk in chunks) == "abcabca"
            assert chunks[-1]["finish_reason"] == "length"
            assert done["usage"] == {
                "prompt_tokens": 3,
                "completion_tokens": 7,
                "cached_tokens": 0,
            }
            timing = done["timing"]
            assert 0 <= timing["ttft_ms"] <= timing["total_ms"]

    run(body, tmp_path)


def test_several_answers_and_a_stop_string(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            await client.submit("r", "one two ", max_tokens=50, n=3, stop=["two one"])
            messages = await client.until_end("r")
            for index in range(3):
                mine = [m for m in messages if m.get("index") == index]
                assert text_of(mine) == "one "
                assert mine[-1]["finish_reason"] == "stop"
                assert mine[-1]["stop"] == "two one"

    run(body, tmp_path)


def test_token_ids_in_a_raw_frame(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            frame = b"\x41\0\0\0\x42\0\0\0"
            params = {"max_tokens": 3}
            await client.send("submit", frame, request_id="r", token_frame=True, params=params)
            messages = await client.until_end("r")
            chunks = [m for m in messages if m["type"] == "chunk"]
            assert [token for chunk in chunks for token in chunk["token_ids"]] == [65, 66, 65]

    run(body, tmp_path)


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
    raw.settimeout(20)
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


def test_credit_holds_chunks_back_and_nothing_is_lost(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            stack.engine.steps_allowed = 1
            await client.submit("slow", "slow reader ", credit=2, max_tokens=500)
            messages = [await client.receive(), await client.receive()]
            stack.engine.steps_allowed = 1  # a chunk each, however slowly anybody runs
            messages.append(await client.receive())
            assert [m["type"] for m in messages] == ["accepted", "chunk", "chunk"]
            stack.engine.steps_allowed = math.inf
            await until(lambda: stack.service.num_running == 0)  # the engine is through with it
            assert await client.received_before_pong() == []
            await client.send("credit", request_id="slow", chunks=1)
            rest = await client.until_end("slow")
            assert [m["type"] for m in rest] == ["chunk", "done"]
            assert text_of(messages + rest) == echoed("slow reader ", 500)
            assert rest[-1]["usage"]["completion_tokens"] == 500
            await client.send("credit", request_id="slow", chunks=1)  # late: ignored
            await client.send("credit", request_id="slow", chunks=0)
            await still_serves(stack, client)

    run(body, tmp_path)


def one_chunk_per_step(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """Lets the engine step when a send was tried, until the queue was full once.

    Else a busy machine merges thousands of tokens into few chunks, which fill no queue. Returns
    the outcomes of the sends, as they come.
    """
    outcomes: list[Sent] = []

    def observed(*arguments: Any) -> Sent:
        outcomes.append(try_send(*arguments))
        stack.engine.steps_allowed = math.inf if Sent.FULL in outcomes else 1
        return outcomes[-1]

    monkeypatch.setattr(zmq_front, "try_send", observed)
    return outcomes


def test_a_full_queue_merges_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlimited credit, but the client does not read: the server must not queue without bound."""
    monkeypatch.setattr(zmq_front, "SEND_QUEUE_MESSAGES", 4)

    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint, rcvhwm=1, rcvbuf=4096) as client:
            await client.hello()
            outcomes = one_chunk_per_step(stack, monkeypatch)
            num_tokens = 20_000
            await client.submit("r", "does not read ", credit=1_000_000, max_tokens=num_tokens)
            await until(lambda: stack.service.num_running == 1)
            await until(lambda: stack.service.num_running == 0, timeout_s=150)
            messages = await client.until_end("r")
            chunks = [m for m in messages if m["type"] == "chunk"]
            assert Sent.FULL in outcomes
            assert len(chunks) < num_tokens // 2
            assert text_of(chunks) == echoed("does not read ", num_tokens)

    run(body, tmp_path, ZmqConfig(peer_timeout_s=100))


def test_a_client_that_never_reads_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq_front, "SEND_QUEUE_MESSAGES", 4)

    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint, rcvhwm=1, rcvbuf=4096) as client:
            await client.hello()
            one_chunk_per_step(stack, monkeypatch)
            for number in range(8):
                await client.submit(f"r{number}", "x", credit=1_000_000, max_tokens=90_000)

            async def pretend_to_live() -> None:
                while True:
                    await client.send("pong")
                    await asyncio.sleep(0.02)

            alive = asyncio.create_task(pretend_to_live())
            await until(lambda: stack.service.num_running == 8)
            await until(lambda: stack.front.num_sessions == 0, timeout_s=150)
            await until(lambda: not stack.engine.has_work)
            alive.cancel()

    run(body, tmp_path, ZmqConfig(heartbeat_s=0.1, peer_timeout_s=0.5))


@pytest.mark.parametrize("how", ["disconnects", "falls silent"])
def test_requests_of_a_vanished_client_are_cancelled(tmp_path: Path, how: str) -> None:
    async def body(stack: Stack) -> None:
        client = RawClient(stack.endpoint)
        await client.hello()
        stack.engine.gate.clear()
        for number in range(3):
            await client.submit(f"r{number}", "never read", max_tokens=90_000)
        await until(lambda: stack.engine.scheduler.num_waiting == 3)
        if how == "disconnects":
            client.close()
        await until(lambda: stack.front.num_sessions == 0)
        await until(lambda: not stack.engine.has_work and stack.service.num_running == 0)
        if how != "disconnects":
            client.close()

    run(body, tmp_path, ZmqConfig(heartbeat_s=0.05, peer_timeout_s=0.3))


def test_cancel(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            await client.submit("r", "abc", credit=1, max_tokens=90_000, n=2)
            await until(lambda: stack.engine.has_work)
            await client.send("cancel", request_id="r")
            messages = await client.until_end("r")
            assert messages[-1]["type"] == "done"
            last = {m["index"]: m for m in messages if m["type"] == "chunk"}
            assert {m["finish_reason"] for m in last.values()} == {"cancelled"}
            assert set(last) == {0, 1}
            await until(lambda: not stack.engine.has_work)
            await client.send("cancel", request_id="r")  # too late, and of an unknown one: ignored
            await client.send("cancel", request_id="unknown")
            await still_serves(stack, client, "r")  # the id is free again

    run(body, tmp_path)


def test_deadline(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        stack.engine.gate.clear()  # it would never end by itself
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            await client.send("submit", request_id="r", prompt="abc", deadline_ms=50)
            messages = await client.until_end("r")
            assert [m.get("finish_reason") for m in messages] == [None, "deadline", None]

    run(body, tmp_path)


def test_duplicate_ids_and_the_in_flight_limit(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        stack.engine.gate.clear()
        async with RawClient(stack.endpoint) as client, RawClient(stack.endpoint) as other:
            await client.hello()
            await other.hello()
            await client.submit("same", "mine ", max_tokens=10)
            await client.submit("same", "again ", max_tokens=10)
            await other.submit("same", "theirs ", max_tokens=10)  # another client: another request
            for number in range(3):
                await client.submit(f"r{number}", "more ", max_tokens=5)
            errors = [m for m in await client.received_before_pong() if m["type"] == "error"]
            assert [(e["request_id"], e["code"]) for e in errors] == [
                *[("same", "invalid_request"), ("r2", "overloaded")]
            ]
            stack.engine.gate.set()
            assert text_of(await client.until_end("same")) == echoed("mine ", 10)
            assert text_of(await other.until_end("same")) == echoed("theirs ", 10)

    run(body, tmp_path, ZmqConfig(max_in_flight=3))


def test_stop_tells_the_clients(tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        stack.engine.gate.clear()
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            await client.submit("r", "abc")
            assert (await client.receive())["type"] == "accepted"
            assert not await stack.front.drain(0.01)
            await stack.front.stop()
            error = await client.receive()
            assert (error["request_id"], error["code"]) == ("r", "engine_unavailable")
            await until(lambda: not stack.engine.has_work)

    run(body, tmp_path)


def test_a_defect_does_not_leave_the_front_deaf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lasting_task, "RESTART_S", 0.01)

    async def body(stack: Stack) -> None:
        async with RawClient(stack.endpoint) as client:
            await client.hello()
            with monkeypatch.context() as broken:
                broken.setattr(stack.front, "_take", None)
                await client.send("ping")
                await until(lambda: "starts again" in caplog.text)
            await still_serves(stack, client)

    run(body, tmp_path)
