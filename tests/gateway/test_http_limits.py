"""Sizes, stalls and the API key, checked before any handler runs."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from support.http_servers import BigramServer, error_of, read_to_end

from moeserve.config import HttpConfig
from moeserve.core import ConfigError
from moeserve.gateway import http_server

TEXT = "/v1/completions"
JSON = {"content-type": "application/json"}
KEY = "sk-test-schlüssel"
CONFIG = HttpConfig(
    port=0,
    api_key=KEY,
    max_body_bytes=2000,
    max_header_bytes=4000,
    max_tokens_cap=50,
    max_n=3,
    max_prompts=4,
)
BEARER = {"authorization": f"Bearer {KEY}".encode()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BigramServer]:
    with BigramServer(tmp_path_factory.mktemp("model"), CONFIG) as server:
        server.client.headers.update({"authorization": f"Bearer {KEY}".encode()})
        yield server


def padded(size: int) -> bytes:
    """A valid body of exactly so many bytes."""
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    return body + b" " * (size - len(body))


def test_body_size(server: BigramServer) -> None:
    fits = server.client.post(TEXT, content=padded(2000), headers=JSON)
    assert fits.status_code == 200, fits.text
    large = server.client.post(TEXT, content=padded(2001), headers=JSON)
    assert large.status_code == 413
    assert "2000" in error_of(large)["message"]


def test_body_size_without_a_length(server: BigramServer) -> None:
    def pieces(size: int) -> Iterator[bytes]:
        body = padded(size)
        yield from (body[at : at + 100] for at in range(0, size, 100))

    fits = server.client.post(TEXT, content=pieces(2000), headers=JSON)
    assert fits.status_code == 200, fits.text
    large = server.client.post(TEXT, content=pieces(50_000), headers=JSON)
    assert large.status_code == 413
    error_of(large)


def test_two_lengths_of_one_body_are_refused(server: BigramServer) -> None:
    """Whoever stands before the server may have taken the other one."""
    with socket.create_connection(server.address, timeout=120) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
        key = b"authorization: Bearer " + KEY.encode() + b"\r\n"
        both = b"content-length: 5\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        connection.sendall(head + key + both + b"2\r\n{}\r\n0\r\n\r\n")
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"transfer-encoding" in answer


@pytest.mark.parametrize("length", [b"99999999999999999999", b"5000"])
def test_an_announced_length_is_enough_to_refuse(server: BigramServer, length: bytes) -> None:
    """Nobody has to send the body first, nor do we have to read it."""
    with socket.create_connection(server.address, timeout=120) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
        key = b"authorization: Bearer " + KEY.encode() + b"\r\n"
        connection.sendall(head + key + b"content-length: " + length + b"\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_header_size(server: BigramServer) -> None:
    assert server.client.get("/v1/models", headers={"x": "y" * 3000}).status_code == 200
    large = server.client.get("/v1/models", headers={"x": "y" * 5000})
    assert large.status_code == 431
    assert "4000" in error_of(large)["message"]
    many = server.client.get("/v1/models", headers={f"x{i}": "y" for i in range(1000)})
    assert many.status_code == 431


def test_a_head_beyond_what_the_parser_takes(server: BigramServer) -> None:
    with socket.create_connection(server.address, timeout=120) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: " + b"y" * 200_000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert server.client.get("/health").status_code == 200


def test_a_body_that_stalls(tmp_path: Path) -> None:
    """A server of its own: of the others' bodies the next piece may be late on a busy machine."""
    hasty = replace(CONFIG, body_timeout_s=0.2)
    with (
        BigramServer(tmp_path, hasty) as server,
        socket.create_connection(server.address, timeout=120) as connection,
    ):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
        key = b"authorization: Bearer " + KEY.encode() + b"\r\n"
        connection.sendall(head + key + b"connection: close\r\ncontent-length: 100\r\n\r\n{")
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


def test_caps(server: BigramServer) -> None:
    for body, field in (
        ({"prompt": "a", "max_tokens": 51}, "max_tokens"),
        ({"prompt": "a", "n": 4}, "n"),
        ({"prompt": ["a"] * 5}, "prompt"),
    ):
        response = server.client.post(TEXT, json=body)
        assert response.status_code == 400
        assert error_of(response)["param"] == field
    fine = server.client.post(TEXT, json={"prompt": ["a"] * 4, "max_tokens": 50, "n": 3})
    assert len(fine.json()["choices"]) == 12


# -- the key ------------------------------------------------------------------------------------

ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/bigram"),
    ("POST", TEXT),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/no/such/path"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/health/../v1/models"),
]
WRONG_KEYS = [
    None,
    b"",
    b"Bearer",
    b"Bearer wrong",
    b"Bearer " + KEY.encode()[:-1],
    b"Bearer " + KEY.encode() + b"x",
    b"Bearer  " + KEY.encode(),
    b"Basic " + KEY.encode(),
    KEY.encode(),
    b"Bearer \xff\xfe",
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_health_wants_the_key(server: BigramServer, method: str, path: str) -> None:
    with httpx.Client(base_url=server.url, timeout=120) as stranger:
        for key in WRONG_KEYS:
            headers = {} if key is None else {"authorization": key}
            response = stranger.request(method, path, headers=headers)
            assert response.status_code == 401, (key, response.text)
            assert response.headers["www-authenticate"] == "Bearer"
            assert error_of(response)["code"] == "unauthorized"
    assert server.client.request(method, path).status_code != 401


def test_health_is_open(server: BigramServer) -> None:
    assert httpx.get(f"{server.url}/health", timeout=120).status_code == 200


def test_two_keys_are_none(server: BigramServer) -> None:
    headers = [("authorization", b"Bearer wrong"), ("authorization", f"Bearer {KEY}".encode())]
    with httpx.Client(base_url=server.url, timeout=120) as client:
        assert client.get("/v1/models", headers=headers).status_code == 401


def test_the_scheme_is_case_insensitive(server: BigramServer) -> None:
    headers = {"authorization": f"bearer {KEY}".encode()}
    assert httpx.get(f"{server.url}/v1/models", headers=headers, timeout=120).status_code == 200


def test_an_empty_key_is_no_key() -> None:
    for key in ("", "  "):
        with pytest.raises(ConfigError, match="api_key"):
            HttpConfig(api_key=key)


# -- binding ------------------------------------------------------------------------------------


def test_a_taken_port_is_an_error_that_names_it() -> None:
    with http_server.bind(HttpConfig(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--port"):
            http_server.bind(HttpConfig(port=port))


def test_an_unknown_host_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid"):
        http_server.bind(HttpConfig(host="no.such.host.invalid", port=0))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"] if socket.has_ipv6 else ["127.0.0.1"])
def test_answers_do_not_wait_for_acknowledgements(host: str) -> None:
    """40 ms per answer on Linux (Nagle's algorithm against delayed ACKs)."""
    with (
        http_server.bind(HttpConfig(host=host, port=0)) as listener,
        socket.create_connection(listener.getsockname()[:2]),
    ):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_addresses_are_urls() -> None:
    with http_server.bind(HttpConfig(port=0)) as listener:
        assert http_server.url_of(listener).startswith("http://127.0.0.1:")
    if socket.has_ipv6:
        with http_server.bind(HttpConfig(host="::1", port=0)) as listener:
            assert http_server.url_of(listener).startswith("http://[::1]:")
