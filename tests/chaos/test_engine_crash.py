"""The engine of a real server dies in the middle of streams; the gateway dies with an engine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest
from server_process import Server, running_server

from moeserve.client import Chunk, Client, ServerError

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--max-engine-restarts", "2", "--num-threads", "1") as running:
        yield running


def engine_of(server: Server) -> psutil.Process:
    for child in psutil.Process(server.process.pid).children():
        if "moeserve.engine.process" in child.cmdline():
            return child
    raise AssertionError("the gateway has no engine process")


def wait_for(condition: Callable[[], bool], timeout_s: float = 200.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came about"
        time.sleep(0.05)


def health(server: Server) -> httpx.Response:
    return httpx.get(f"{server.http}/health", trust_env=False, timeout=120)


def greedy(client: Client) -> str:
    return client.generate(PROMPT, max_tokens=16, temperature=0).text


def read_until_error(client: Client, started: threading.Barrier, errors: list[ServerError]) -> None:
    chunks: list[Chunk] = []
    try:
        # Eight answers up to the end of the context, at the speed of 32: far from the end when all
        # streams have begun, however late this process hears of it.
        with client.stream(PROMPT, max_tokens=900, n=8, temperature=0, ignore_eos=True) as stream:
            chunks.append(next(stream))
            started.wait(200)
            chunks.extend(stream)
    except ServerError as error:
        errors.append(error)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_crash_ends_the_streams_and_the_next_request_is_served(
    server: Server, how: signal.Signals
) -> None:
    with Client(server.zmq) as client:
        before = greedy(client)
        engine = engine_of(server)
        errors: list[ServerError] = []
        started = threading.Barrier(5)
        readers = [
            threading.Thread(target=read_until_error, args=(client, started, errors))
            for _ in range(4)
        ]
        for reader in readers:
            reader.start()
        started.wait(200)  # every stream has had a chunk
        engine.send_signal(how)
        for reader in readers:
            reader.join(200)
        assert [error.code for error in errors] == ["engine_unavailable"] * 4
        wait_for(lambda: health(server).status_code == 200)
        assert engine_of(server).pid != engine.pid
        assert greedy(client) == before


def test_too_many_crashes_are_told(server: Server) -> None:
    """Both restarts are used up by the tests above."""
    wait_for(lambda: health(server).status_code == 200)
    engine_of(server).kill()
    wait_for(lambda: "failed" in health(server).text or server.process.poll() is not None)
    if server.process.poll() is None:
        answer = health(server)
        assert answer.status_code == 503
        assert "SIGKILL" in answer.text
        with Client(server.zmq) as client, pytest.raises(ServerError) as caught:
            greedy(client)
        assert caught.value.code == "engine_unavailable"
    else:
        assert server.process.returncode != 0


def test_an_engine_does_not_outlive_a_killed_gateway() -> None:
    with running_server("--num-threads", "1") as server:
        engine = engine_of(server)
        os.kill(server.process.pid, signal.SIGKILL)
        wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
