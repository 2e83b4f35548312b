"""Streams under a clock of our own: the engine steps only while its gate is open."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.http_servers import BigramServer, error_of, events_of, read_to_end

from moeserve.core import ErrorCode, FinishReason, RequestError
from moeserve.gateway.http_stream import KEEP_ALIVE, EventStreamResponse, sse

TEXT = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": 1000, "ignore_eos": True}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[BigramServer]:
    with BigramServer(tmp_path) as server:
        yield server


def send_request(
    server: BigramServer, body: dict[str, Any], receive_bytes: int = 1 << 16
) -> socket.socket:
    """Sends a request over a bare socket, whose reading and closing are then up to us."""
    content = json.dumps(body).encode()
    head = (
        f"POST {TEXT} HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    connection = socket.socket()
    connection.settimeout(120)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect(server.address)
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_during_prefill_is_cancelled(
    server: BigramServer, stream: bool
) -> None:
    engine = server.inside.engine
    server.call(engine.gate.clear)
    connection = send_request(server, {**LONG, "stream": stream, "n": 2})
    server.wait_until(lambda: engine.num_running == 2)
    connection.close()
    server.wait_until(lambda: not engine.num_running)
    assert [reason for _, reason in engine.aborted] == [FinishReason.CANCELLED] * 2
    assert {r.request_id for r in engine.submitted} == {i for i, _ in engine.aborted}
    server.wait_until(lambda: not server.inside.service.num_running)


def test_a_client_that_leaves_while_its_prompts_start(server: BigramServer) -> None:
    engine = server.inside.engine
    server.call(engine.gate.clear)
    connection = send_request(server, {**LONG, "prompt": ["a", "b", "c"]})
    server.wait_until(lambda: engine.num_running == 3)
    connection.close()
    server.wait_until(lambda: not engine.num_running)


def test_a_client_that_leaves_in_mid_stream_is_cancelled(server: BigramServer) -> None:
    engine = server.inside.engine
    with server.client.stream("POST", TEXT, json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.call(engine.gate.clear)
    server.wait_until(lambda: not engine.num_running)
    assert len(engine.aborted) == 1


def test_half_a_request_leaves_nothing(server: BigramServer) -> None:
    connection = socket.create_connection(server.address, timeout=120)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-length: 100\r\n")
    connection.sendall(b'content-type: application/json\r\n\r\n{"prompt": "a')
    connection.close()
    assert server.client.post(TEXT, json={"prompt": "a"}).status_code == 200


def test_garbage_instead_of_http(server: BigramServer) -> None:
    with socket.create_connection(server.address, timeout=120) as connection:
        connection.sendall(b"\x00\xff" * 50 + b"\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies_before_the_first_token_is_503(
    server: BigramServer, stream: bool
) -> None:
    engine = server.inside.engine
    server.call(engine.gate.clear)
    with send_request(server, {**LONG, "stream": stream}) as connection:
        server.wait_until(lambda: engine.num_running == 1)
        server.call(engine.crash)
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"engine_unavailable"' in answer
    health = server.client.get("/health")
    assert health.status_code == 503
    assert health.json()["status"] == "failed"
    assert "signal 9" in health.json()["detail"]
    refusal = server.client.post(TEXT, json={**LONG, "stream": stream})
    assert refusal.status_code == 503
    assert "signal 9" in error_of(refusal)["message"]


def test_an_engine_that_dies_in_mid_stream_is_an_error_event(server: BigramServer) -> None:
    engine = server.inside.engine
    with server.client.stream("POST", TEXT, json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        assert "error" not in next(lines)
        server.call(engine.crash)
        rest = [line for line in lines if line]
    at = rest.index("event: error")
    error = json.loads(rest[at + 1].removeprefix("data: "))["error"]
    assert error["code"] == "engine_unavailable"
    assert error["type"] == "server_error"
    assert "data: [DONE]" not in rest


def test_draining_refuses_new_requests_and_lets_running_ones_finish(server: BigramServer) -> None:
    engine, lifecycle = server.inside.engine, server.inside.lifecycle
    server.call(engine.gate.clear)
    body = {**LONG, "max_tokens": 5, "stream": True}
    with send_request(server, body) as connection:
        server.wait_until(lambda: engine.num_running == 1)
        server.call(lifecycle.begin_drain)
        health = server.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        refusal = server.client.post(TEXT, json={"prompt": "a"})
        assert refusal.status_code == 503
        assert "draining" in error_of(refusal)["message"]
        assert int(refusal.headers["retry-after"]) > 0
        server.call(engine.gate.set)
        answer = read_to_end(connection)
    assert b"data: [DONE]" in answer
    assert b'"finish_reason":"length"' in answer


def test_streams_ended_by_the_server_say_why(server: BigramServer) -> None:
    engine, service = server.inside.engine, server.inside.service
    with server.client.stream("POST", TEXT, json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.call(engine.gate.clear)
        server.call(service.cancel_all)
        rest = [line for line in lines if line]
    assert "event: error" in rest
    assert "shutting down" in rest[-1]


def test_loading_is_503_everywhere_but_on_status_routes(server: BigramServer) -> None:
    def load() -> None:
        server.inside.engine.stage = "loading"
        server.inside.engine.detail = "reading weights"

    server.call(load)
    health = server.client.get("/health")
    assert health.status_code == 503
    assert health.json() == {"status": "loading", "detail": "reading weights", "progress": 0.0}
    for path, body in ((TEXT, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        response = server.client.post(path, json=body)
        assert response.status_code == 503
        assert "loading" in error_of(response)["message"]
    assert server.client.get("/v1/models").status_code == 503
    assert server.client.get("/metrics").status_code == 200


def test_one_bad_prompt_among_many_cancels_the_others(server: BigramServer) -> None:
    engine = server.inside.engine
    body = {**LONG, "prompt": ["fine", "x" * 5000]}
    response = server.client.post(TEXT, json=body)
    assert response.status_code == 400
    error_of(response)
    server.wait_until(lambda: not engine.num_running)
    assert len(engine.submitted) == len(engine.aborted) == 1


def test_a_slow_reader_gets_everything(server: BigramServer) -> None:
    """The engine finishes long before; what waits is merged, not lost."""
    body = {**LONG, "prompt": "slow", "max_tokens": 3000, "seed": 1}
    whole = server.client.post(TEXT, json=body).json()["choices"][0]["text"]
    with server.client.stream("POST", TEXT, json={**body, "stream": True}) as response:
        server.wait_until(lambda: not server.inside.engine.num_running)
        text = "".join(event["choices"][0]["text"] for event in events_of(response))
    assert text == whole


def test_a_reader_that_reads_nothing_does_not_hold_up_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with BigramServer(tmp_path) as server:
        body = {**LONG, "max_tokens": 3000, "n": 4, "logprobs": 20, "stream": True}
        connection = send_request(server, body, receive_bytes=2048)
        engine = server.inside.engine
        server.wait_until(lambda: len(engine.submitted) == 4 and not engine.num_running)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    size = len(read_until_reset(connection))
    assert size < 4 * 3000 * 20 * 10, "the test is void: everything fitted into the buffers"


def read_until_reset(connection: socket.socket) -> bytes:
    pieces = []
    with connection, suppress(ConnectionResetError):
        while piece := connection.recv(1 << 20):
            pieces.append(piece)
    return b"".join(pieces)


def test_many_streams_at_once_keep_their_own_tokens(server: BigramServer) -> None:
    async def ask(client: httpx.AsyncClient, seed: int) -> tuple[str, str]:
        body = {"prompt": f"prompt {seed}", "max_tokens": 40, "seed": seed, "n": 2}
        whole, streamed = await asyncio.gather(
            client.post(TEXT, json=body), client.post(TEXT, json={**body, "stream": True})
        )
        texts = [choice["text"] for choice in whole.json()["choices"]]
        parts = ["", ""]
        for event in events_of(streamed):
            parts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        return "".join(texts), "".join(parts)

    async def run() -> list[tuple[str, str]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(16)))

    pairs = asyncio.run(run())
    assert all(whole == streamed for whole, streamed in pairs)
    assert len({whole for whole, _ in pairs}) == 16


# -- the response alone -------------------------------------------------------------------------


class Wire:
    """The server's side of ASGI: collects what is sent, disconnects when told."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def run_response(
    events: AsyncGenerator[bytes, None], keep_alive_s: float = 60, wire: Wire | None = None
) -> Wire:
    wire = wire or Wire()

    async def run() -> Wire:
        response = EventStreamResponse(events, {}, keep_alive_s)
        await response({"type": "http"}, wire.receive, wire.send)
        return wire

    return asyncio.run(run())


async def comment_on(wire: Wire) -> None:
    while KEEP_ALIVE not in wire.body:
        await asyncio.sleep(0.001)


def test_silence_is_bridged_by_comments() -> None:
    wire = Wire()

    async def events() -> AsyncGenerator[bytes, None]:
        yield sse({"a": 1})
        await comment_on(wire)
        yield sse({"a": 2})

    body = run_response(events(), keep_alive_s=0.01, wire=wire).body
    assert KEEP_ALIVE in body
    assert body.replace(KEEP_ALIVE, b"") == b'data: {"a":1}\n\ndata: {"a":2}\n\ndata: [DONE]\n\n'


def test_comments_also_before_the_first_event() -> None:
    wire = Wire()

    async def events() -> AsyncGenerator[bytes, None]:
        await comment_on(wire)
        raise RequestError("too late for a status", code=ErrorCode.OVERLOADED)
        yield b""

    run_response(events(), keep_alive_s=0.01, wire=wire)
    assert wire.sent[0]["status"] == 200
    assert wire.body.startswith(KEEP_ALIVE)
    assert b"event: error\ndata: " in wire.body
    assert wire.sent[-1]["more_body"] is False


def test_an_early_error_has_its_own_status() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        raise RequestError("busy", code=ErrorCode.OVERLOADED)
        yield b""

    wire = run_response(events())
    assert wire.sent[0]["status"] == 429
    assert (b"retry-after", b"1") in wire.sent[0]["headers"]


def test_the_generator_is_closed_when_the_client_leaves() -> None:
    closed = False

    async def events() -> AsyncGenerator[bytes, None]:
        nonlocal closed
        try:
            yield sse({})
            await asyncio.Event().wait()
        finally:
            closed = True

    async def run() -> Wire:
        wire = Wire()
        response = asyncio.ensure_future(
            EventStreamResponse(events(), {})({"type": "http"}, wire.receive, wire.send)
        )
        while not wire.body:
            await asyncio.sleep(0)
        wire.gone.set()
        await response
        return wire

    wire = asyncio.run(run())
    assert closed
    assert b"[DONE]" not in wire.body
