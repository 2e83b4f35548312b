"""Clients that send so slowly that they never come to an end. The server's clock is the test's."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest
from support.http_servers import PATIENCE_S, BigramServer, read_to_end

from moeserve.config import HttpConfig

LIMIT_S = 1000.0
STALL_S = 500.0
CONFIG = HttpConfig(port=0, receive_timeout_s=LIMIT_S, body_timeout_s=STALL_S)
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
ENDLESS = HEAD + b"content-length: 100000\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BigramServer]:
    with BigramServer(tmp_path_factory.mktemp("model"), CONFIG) as server:
        yield server
        assert server.client.get("/health").status_code == 200


@pytest.fixture
def connection(server: BigramServer) -> Iterator[socket.socket]:
    with socket.create_connection(server.address, timeout=PATIENCE_S) as connection:
        # Every byte leaves at once, so that it is there before time passes.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.wait_until(lambda: bool(server.server.num_connections))
        yield connection
    server.wait_until(lambda: not server.server.num_connections)


def dribble(server: BigramServer, connection: socket.socket) -> bytes:
    """A byte, a pause, a byte, until it has taken too long. What the server says then."""
    for _ in range(12):
        connection.sendall(b" ")
        server.pass_time(80)  # far below what counts as stalling
        assert server.server.num_connections == 1, "closed before its time"
    server.pass_time(80)
    return read_to_end(connection)


def answer_to(connection: socket.socket, request: bytes) -> int:
    """The status of the answer, which is read whole; the connection stays open."""
    connection.sendall(request)
    response = HTTPResponse(connection)
    response.begin()
    response.read()
    return response.status


def begin_a_body(connection: socket.socket) -> None:
    """Sends an endless one's head, and waits until a handler waits for the rest."""
    connection.sendall(ENDLESS.replace(b"host:", b"expect: 100-continue\r\nhost:"))
    assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")


def status_and_error(answer: bytes) -> tuple[int, dict[str, str]]:
    head, body = answer.split(b"\r\n\r\n", 1)
    assert b"connection: close" in head.lower()
    assert b"application/json" in head
    error: dict[str, str] = json.loads(body)["error"]
    return int(head.split()[1]), error


def test_a_body_byte_by_byte(server: BigramServer, connection: socket.socket) -> None:
    """It never stalls, and would take months."""
    begin_a_body(connection)
    status, error = status_and_error(dribble(server, connection))
    assert status == 408
    assert error["code"] == "request_timeout"
    assert "1000 s" in error["message"]


def test_a_body_that_stalls_is_told_so(server: BigramServer, connection: socket.socket) -> None:
    begin_a_body(connection)
    server.pass_time(STALL_S + 1)
    status, error = status_and_error(read_to_end(connection))
    assert status == 408
    assert "nothing came for 500 s" in error["message"]


def test_a_head_byte_by_byte(server: BigramServer, connection: socket.socket) -> None:
    connection.sendall(HEAD + b"x:")
    status, error = status_and_error(dribble(server, connection))
    assert status == 408
    assert "head" in error["message"]


def test_the_head_of_a_second_request(server: BigramServer, connection: socket.socket) -> None:
    assert answer_to(connection, GET) == 200
    connection.sendall(HEAD + b"x:")
    assert status_and_error(dribble(server, connection))[0] == 408


def test_a_connection_without_a_request(server: BigramServer, connection: socket.socket) -> None:
    server.pass_time(LIMIT_S + 1)
    assert read_to_end(connection) == b""


def test_a_body_that_was_answered_early(server: BigramServer, connection: socket.socket) -> None:
    """Nobody waits for it; its rest is read and dropped, but not for good."""
    assert answer_to(connection, ENDLESS.replace(b"/v1/completions", b"/no/such/path")) == 404
    assert dribble(server, connection) == b""


def test_after_a_body_that_was_answered_early(
    server: BigramServer, connection: socket.socket
) -> None:
    """Once it is there the connection is as good as any, and no better."""
    unfinished = HEAD.replace(b"/v1/completions", b"/no") + b"content-length: 2\r\n\r\n{"
    assert answer_to(connection, unfinished) == 404
    assert answer_to(connection, b"}" + GET) == 200
    assert answer_to(connection, unfinished) == 404
    connection.sendall(b"}")
    server.pass_time(LIMIT_S + 1)
    assert read_to_end(connection) == b""


def test_time_between_requests_is_nobodys(server: BigramServer, connection: socket.socket) -> None:
    """Each of them is quick; together they take longer than one may."""
    for _ in range(int(LIMIT_S / 2) + 2):
        assert answer_to(connection, GET) == 200
        server.pass_time(2)


def test_time_in_which_an_answer_is_made_does_not_count(
    server: BigramServer, connection: socket.socket
) -> None:
    engine = server.inside.engine
    server.call(engine.gate.clear)
    body = json.dumps({"prompt": "a", "max_tokens": 3, "ignore_eos": True, "stream": True}).encode()
    length = b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    connection.sendall(HEAD + length + body)
    server.wait_until(lambda: engine.num_running == 1)
    server.pass_time(10 * LIMIT_S)
    server.call(engine.gate.set)
    answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"data: [DONE]" in answer


@pytest.mark.parametrize("before", [b"", ENDLESS.replace(b"content-length", b"x")])
def test_what_is_no_http_is_an_error_of_the_usual_shape(
    server: BigramServer, connection: socket.socket, before: bytes
) -> None:
    """At once, or after a request that is still answered; the connection ends."""
    connection.sendall(before + b"\x00\x01 nonsense\r\n\r\n")
    *_, last = read_to_end(connection).split(b"HTTP/1.1 ")
    status, error = status_and_error(b"HTTP/1.1 " + last)
    assert status == 400
    assert error["type"] == "invalid_request_error"
