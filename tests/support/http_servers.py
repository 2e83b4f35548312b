"""HTTP servers for tests: the real one as a process, and a real uvicorn around a bigram engine."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI
from server_process import running_server
from support.bigram_engine import BigramEngine, write_byte_tokenizer

from moeserve.config import HttpConfig
from moeserve.gateway import http_server
from moeserve.gateway.app import create_app
from moeserve.gateway.lifecycle import Lifecycle
from moeserve.gateway.metrics import Metrics
from moeserve.gateway.service import GenerationService
from moeserve.text.request import RequestLimits

T = TypeVar("T")
PATIENCE_S = 120


@contextmanager
def real_server(*flags: str) -> Iterator[httpx.Client]:
    """A client of a `moeserve serve` process with the bundled model."""
    with running_server(*flags) as server, httpx.Client(base_url=server.http, timeout=60) as client:
        yield client


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON bodies of a complete event stream; fails unless it ends with [DONE]."""
    data = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]", data[-3:]
    return [json.loads(item) for item in data[:-1]]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object; fails unless the body has the OpenAI shape."""
    body = response.json()
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def read_to_end(connection: socket.socket) -> bytes:
    """Everything that comes until the other side closes."""
    pieces = []
    while piece := connection.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


@dataclass
class BigramApp:
    """The application around a bigram engine, in the current event loop."""

    app: FastAPI
    engine: BigramEngine
    lifecycle: Lifecycle
    service: GenerationService
    metrics: Metrics


@asynccontextmanager
async def bigram_app(path: Path, config: HttpConfig | None = None) -> AsyncIterator[BigramApp]:
    config = config or HttpConfig()
    write_byte_tokenizer(path)
    engine = BigramEngine(path)
    lifecycle = Lifecycle(engine)
    metrics = Metrics(lambda: engine.status)
    limits = RequestLimits(max_n=config.max_n, max_tokens_cap=config.max_tokens_cap)
    service = await GenerationService.load(engine, limits, observer=metrics)
    lifecycle.open(service)
    running = asyncio.create_task(engine.run())
    try:
        app = create_app(lifecycle, config, metrics)
        yield BigramApp(app, engine, lifecycle, service, metrics)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        service.assets.close()


class BigramServer:
    """The same behind uvicorn on a loopback port, in a thread with an event loop of its own."""

    def __init__(self, path: Path, config: HttpConfig | None = None) -> None:
        self._path = path
        self._config = config or HttpConfig(port=0)
        self._started = threading.Event()
        self._passed_s = 0.0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.time = lambda: time.monotonic() + self._passed_s  # type: ignore[method-assign]
        self._stop = asyncio.Event()
        async with bigram_app(self._path, self._config) as self.inside:
            listener = http_server.bind(self._config)
            self.url = http_server.url_of(listener)
            self.address = listener.getsockname()[:2]
            self.server = http_server.HttpServer(self.inside.app, self._config, listener)
            self.server.start()
            self._started.set()
            await self._stop.wait()
            await self.server.stop()

    def __enter__(self) -> BigramServer:
        self._thread.start()
        assert self._started.wait(PATIENCE_S), "the server did not start"
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function in the server's event loop."""

        async def run() -> T:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE_S)

    def pass_time(self, seconds: float) -> None:
        """All timers of the server's event loop are so much nearer to their end."""

        def pass_it() -> None:
            self._passed_s += seconds

        self.call(pass_it)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns once `condition` holds in the server's event loop."""

        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.001)

        asyncio.run_coroutine_threadsafe(asyncio.wait_for(poll(), PATIENCE_S), self._loop).result()
