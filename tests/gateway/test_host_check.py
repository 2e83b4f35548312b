"""The Host header: without a key only names of this server are answered."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest
from support.http_servers import BigramServer, error_of

from moeserve.config import HttpConfig

OURS = [
    "localhost",
    "LOCALHOST:8000",
    "localhost.",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.9.9.9:80",
    "[::1]",
    "[::1]:8000",
    "[0:0:0:0:0:0:0:1]:8000",
]
# Names that anybody can register, and what a careless comparison would let through.
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "evil-localhost",
    "127.0.0.1.evil.example",
    "127.0.0.1@evil.example",
    "evil.example:80:127.0.0.1",
    "[::1].evil.example",
    "[evil.example]",
    "localhost:8000:9000",
    "localhost evil.example",
    "",
    ":8000",
    "\xe4.example",
]
ADDRESSES = ["192.0.2.7", "192.0.2.7:8000", "[2001:db8::7]:8000"]


def config(**fields: object) -> HttpConfig:
    return HttpConfig(port=0, **fields)  # type: ignore[arg-type]


def answers(server: BigramServer, hosts: list[str], path: str = "/v1/models") -> dict[str, int]:
    """The status with every Host header; checks the shape of refusals."""
    statuses = {}
    for host in hosts:
        response = server.client.get(path, headers={"host": host.encode("latin-1")})
        statuses[host] = response.status_code
        if response.status_code == 421:
            error = error_of(response)
            assert (error["param"], error["code"]) == ("host", "misdirected_request")
            assert "--allowed-host" in error["message"]
            assert repr(host) in error["message"]
    return statuses


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BigramServer]:
    with BigramServer(tmp_path_factory.mktemp("model"), config()) as server:
        yield server


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/openapi.json", "/none"])
def test_only_names_of_ours_are_answered(open_server: BigramServer, path: str) -> None:
    assert set(answers(open_server, FOREIGN, path).values()) == {421}
    assert 421 not in answers(open_server, OURS, path).values()


def test_another_address_is_not_ours(open_server: BigramServer) -> None:
    assert set(answers(open_server, [*ADDRESSES, "0.0.0.0"]).values()) == {421}


def test_nothing_is_generated_for_a_rebound_name(open_server: BigramServer) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    foreign = {"host": "evil.example"}
    before = len(open_server.inside.engine.submitted)
    response = open_server.client.post("/v1/completions", json=body, headers=foreign)
    assert response.status_code == 421
    assert len(open_server.inside.engine.submitted) == before
    assert open_server.client.post("/v1/completions", json=body).status_code == 200
    assert len(open_server.inside.engine.submitted) == before + 1


def test_an_old_client_sends_no_host(open_server: BigramServer) -> None:
    with socket.create_connection(open_server.address, timeout=120) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_names_that_are_allowed(tmp_path_factory: pytest.TempPathFactory) -> None:
    names = ("gpu.example", "2001:db8::7")
    with BigramServer(tmp_path_factory.mktemp("model"), config(allowed_hosts=names)) as server:
        assert set(answers(server, [*OURS, "GPU.example:80", "[2001:db8::7]:80"]).values()) == {200}
        foreign = [*FOREIGN, "sub.gpu.example", "192.0.2.7"]
        assert set(answers(server, foreign).values()) == {421}


def test_bound_everywhere_any_address_is_ours(tmp_path_factory: pytest.TempPathFactory) -> None:
    with BigramServer(tmp_path_factory.mktemp("model"), config(host="0.0.0.0")) as server:
        assert set(answers(server, [*OURS, *ADDRESSES]).values()) == {200}
        assert set(answers(server, FOREIGN).values()) == {421}


def test_with_a_key_any_name_will_do(tmp_path_factory: pytest.TempPathFactory) -> None:
    key = {"authorization": "Bearer k"}
    with BigramServer(tmp_path_factory.mktemp("model"), config(api_key="k")) as server:
        server.client.headers.update(key)
        assert set(answers(server, ["evil.example", *OURS]).values()) == {200}
    # Unless names were given: then they are meant.
    given = config(api_key="k", allowed_hosts=("gpu.example",))
    with BigramServer(tmp_path_factory.mktemp("model"), given) as server:
        foreign = {**key, "host": "evil.example"}
        assert httpx.get(f"{server.url}/v1/models", headers=foreign, timeout=120).status_code == 421
        ours = {**key, "host": "gpu.example"}
        assert httpx.get(f"{server.url}/v1/models", headers=ours, timeout=120).status_code == 200
