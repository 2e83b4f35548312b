"""The gateway process: starts the engine, opens the fronts, and ends them in good order.

SIGTERM or SIGINT: new requests are refused (503, `draining` on /health) while running ones get
`drain_s` to finish; the second signal ends them at once. uvicorn's own signal handling is left
out, because it would close the listener, and with it /health, before the last stream is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import tempfile
from collections.abc import Awaitable, Iterator
from pathlib import Path

import msgspec

from moeserve import __version__
from moeserve.config import GatewayConfig, HttpConfig
from moeserve.core import ConfigError, ErrorCode, ModelInfo, MoeserveError
from moeserve.environment import Environment, default_endpoint, read_environment
from moeserve.gateway import http_server
from moeserve.gateway.app import create_app
from moeserve.gateway.host_check import is_loopback
from moeserve.gateway.lifecycle import Lifecycle
from moeserve.gateway.local_workers import LocalWorkers
from moeserve.gateway.metrics import Metrics
from moeserve.gateway.service import GenerationService
from moeserve.gateway.supervisor import EngineSupervisor, Progress
from moeserve.gateway.zmq_endpoint import check_endpoint, make_private_directory
from moeserve.gateway.zmq_front import ZmqFront
from moeserve.gateway.zmq_link import ZmqEngineLink
from moeserve.progress import LoadingBar
from moeserve.text.request import RequestLimits

log = logging.getLogger(__name__)


async def run_gateway(config: GatewayConfig) -> int:
    """Serves until a signal ends it; returns the exit status.

    Raises MoeserveError when it cannot serve: an address in use, a model that does not load.
    """
    environment = read_environment()
    _set_up_logging(environment.log_level)
    with _runtime_directory(config, environment) as directory, StopSignals() as signals:
        gateway = Gateway(config, directory, environment)
        try:
            await gateway.start()
            await gateway.serve(signals)
        finally:
            await gateway.stop(signals)
    return 0


def _set_up_logging(level: str) -> None:
    number = logging.getLevelName(level.upper())
    if not isinstance(number, int):
        raise ConfigError(
            f"MOESERVE_LOG_LEVEL: {level!r} is not one of debug, info, warning, error",
            field="log_level",
        )
    logging.basicConfig(level=number, format="%(asctime)s gateway %(levelname)s %(message)s")
    # Its start and stop lines say what ours say.
    logging.getLogger("uvicorn").setLevel(max(number, logging.WARNING))


@contextlib.contextmanager
def _runtime_directory(config: GatewayConfig, environment: Environment) -> Iterator[Path]:
    """The private directory for sockets and `server.json`; a fresh one is removed at the end."""
    if config.runtime_dir is not None:
        directory = config.runtime_dir.absolute()
        make_private_directory(directory)
        yield directory
        return
    home = environment.runtime_home
    try:
        fresh = tempfile.TemporaryDirectory(prefix="moeserve-", dir=home)  # has mode 0700
    except OSError as error:
        raise ConfigError(
            f"runtime_dir: cannot make a directory in {home}: {error.strerror}",
            field="runtime_dir",
            hint="give --runtime-dir, or set XDG_RUNTIME_DIR to a directory of yours",
        ) from error
    with fresh as name:
        yield Path(name)


def _client_endpoint(config: GatewayConfig, environment: Environment) -> str:
    """Where ZeroMQ clients connect: as told, beside the other sockets, or where they look first."""
    if config.zmq.endpoint is not None:
        return config.zmq.endpoint
    if config.runtime_dir is not None:
        return f"ipc://{config.runtime_dir.absolute() / 'client.sock'}"
    return default_endpoint(environment)


class StopSignals:
    """SIGTERM and SIGINT as two events: `drain` with the first, `at_once` with the second."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.at_once = asyncio.Event()

    def __enter__(self) -> StopSignals:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.arrived)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def arrived(self) -> None:
        (self.at_once if self.drain.is_set() else self.drain).set()

    async def before_second(self, work: Awaitable[object]) -> bool:
        """Waits for `work`, but no longer than until the second signal. True: it was done."""
        task = asyncio.ensure_future(work)
        second = asyncio.ensure_future(self.at_once.wait())
        await asyncio.wait({task, second}, return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        return task.done()


class Gateway:
    """Engine, service and fronts of one server. start, serve, stop; each once."""

    def __init__(self, config: GatewayConfig, directory: Path, environment: Environment) -> None:
        self.config = config
        self.directory = directory
        self.link = ZmqEngineLink(f"ipc://{directory / 'engine.sock'}")
        self.workers = LocalWorkers(config, directory)
        engine = self.workers.served_to(config.engine)  # to which they are workers as any other
        self.supervisor = EngineSupervisor(
            dataclasses.replace(config, engine=engine, local_workers=0),
            self.link,
            environment.log_level,
        )
        self.lifecycle = Lifecycle(self.link)
        self.metrics = Metrics(lambda: self.link.status)
        self.front = ZmqFront(
            config.zmq,
            _client_endpoint(config, environment),
            self.lifecycle.service,
            f"moeserve {__version__}",
        )
        self.service: GenerationService | None = None
        self.url = ""
        self._addresses_file: Path | None = None  # once it is ours
        self._http: http_server.HttpServer | None = None
        self._http_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Binds, then starts the engine. /health answers from here on."""
        http = self.config.http
        listener = http_server.bind(http)
        self.url = http_server.url_of(listener)
        app = create_app(self.lifecycle, http, self.metrics)
        self._http = http_server.HttpServer(app, http, listener)
        self._http_task = self._http.start()
        _warn_if_open(http)
        await self.front.start()
        check_endpoint(self.link.endpoint, has_curve=False)
        await self.link.start()
        self.workers.start()
        await self.supervisor.start()
        self._write_addresses()
        print(f"moeserve {__version__}: {self.url} and {self.front.endpoint}; loading", flush=True)

    async def serve(self, signals: StopSignals) -> None:
        """Loads, serves, and drains after the first signal."""
        assert self._http_task is not None
        opening = asyncio.create_task(self._open(), name="open")
        stop = asyncio.create_task(signals.drain.wait(), name="stop")
        try:
            await asyncio.wait(
                {opening, stop, self._http_task}, return_when=asyncio.FIRST_COMPLETED
            )
            if opening.done():
                opening.result()  # a model that does not load ends the server
                await asyncio.wait({stop, self._http_task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            opening.cancel()
            stop.cancel()
        if self._http_task.done():
            self._http_task.result()
        await self._drain(signals)

    async def _open(self) -> None:
        """Opens the fronts once the engine has loaded its model."""
        with LoadingBar() as bar:
            await self._wait_ready(bar)
        http = self.config.http
        limits = RequestLimits(max_n=http.max_n, max_tokens_cap=http.max_tokens_cap)
        self.service = await GenerationService.load(self.link, limits, observer=self.metrics)
        self.lifecycle.open(self.service)
        print(f"moeserve: ready: {_describe(self.service.info)} at {self.url}", flush=True)

    async def _wait_ready(self, progress: Progress) -> None:
        """Raises MoeserveError when the engine, or one of the local workers, cannot be had."""
        ready = asyncio.ensure_future(self.supervisor.wait_ready(progress))
        refused = asyncio.ensure_future(self.workers.wait_refused())
        try:
            await asyncio.wait({ready, refused}, return_when=asyncio.FIRST_COMPLETED)
            if refused.done():
                raise MoeserveError(refused.result(), code=ErrorCode.UNAVAILABLE)
            ready.result()
        finally:
            ready.cancel()
            refused.cancel()

    async def _drain(self, signals: StopSignals) -> None:
        self.lifecycle.begin_drain()
        if self.service is None:
            return
        if self.service.num_running:
            log.info(
                "draining: %d requests have %g s to finish; a second signal ends them at once",
                self.service.num_running,
                self.config.drain_s,
            )
        await signals.before_second(self.service.drain(self.config.drain_s))
        self.service.cancel_all()
        if not signals.at_once.is_set():
            await self.front.drain(http_server.FLUSH_S)

    async def stop(self, signals: StopSignals) -> None:
        """Ends fronts and engine, whatever state they are in."""
        self.lifecycle.begin_drain()
        if self._http is not None:
            await self._http.stop()
        await self.front.stop()
        if not await signals.before_second(self.supervisor.stop()):
            self.supervisor.kill()
            await self.supervisor.stop()
        await self.workers.stop()
        await self.link.stop()
        if self.service is not None:
            self.service.assets.close()
        if self._addresses_file is not None:
            self._addresses_file.unlink(missing_ok=True)

    def _write_addresses(self) -> None:
        """For scripts: where the server listens, readable only once it does."""
        addresses = {"http": self.url, "zmq": self.front.endpoint, "pid": os.getpid()}
        self._addresses_file = self.directory / "server.json"
        partial = self._addresses_file.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(addresses))
        partial.replace(self._addresses_file)


def _warn_if_open(http: HttpConfig) -> None:
    if not is_loopback(http.host) and http.api_key is None:
        log.warning("http: %s is reachable by others and asks for no --api-key", http.host)


def _describe(info: ModelInfo) -> str:
    size = f"{info.num_parameters / 1e6:.1f} M parameters"
    return f"{info.name} ({info.model_type}, {size}, {info.dtype} on {info.device})"
