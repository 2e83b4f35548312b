"""A server for the tests of what clients can get wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.http_requests import TEXT
from support.http_servers import BigramServer


@pytest.fixture(scope="module")
def bigram_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BigramServer]:
    with BigramServer(tmp_path_factory.mktemp("model")) as server:
        yield server


@pytest.fixture
def server(bigram_server: BigramServer) -> Iterator[BigramServer]:
    """It goes on after every test, and nothing is left over."""
    yield bigram_server
    answer = bigram_server.client.post(TEXT, json={"prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    bigram_server.wait_until(lambda: not bigram_server.inside.engine.num_running)
    bigram_server.wait_until(lambda: not bigram_server.inside.service.num_running)
