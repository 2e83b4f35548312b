"""uvicorn, held by us: binds first, serves until told, leaves signals alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from moeserve.config import HttpConfig
from moeserve.core import ConfigError
from moeserve.gateway.http_connection import timed_connection

#: seconds in which finished answers must reach their readers when the server ends
FLUSH_S: Final = 2
#: what the parser accepts beyond max_header_bytes, so that our own 431 can answer
HEAD_SLACK_BYTES: Final = 64 * 1024

log = logging.getLogger(__name__)


def bind(config: HttpConfig) -> socket.socket:
    """A listening socket. Raises ConfigError naming address, reason and fix."""
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"http: cannot listen on {config.host}:{config.port}: {error.strerror or error}",
            field="port",
            hint="choose another --port, or --port 0 for a free one, or another --host",
        ) from error
    # Connections inherit it. asyncio sets it only where the socket's protocol number says TCP, and
    # here that is 0: head and body are two writes, so every answer would wait for a delayed ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    """http://HOST:PORT as a client on this machine writes it."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Uvicorn(uvicorn.Server):
    """Without uvicorn's signal handlers: the gateway drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves an ASGI application on a bound socket."""

    def __init__(self, app: ASGIApp, config: HttpConfig, listener: socket.socket) -> None:
        self._listener = listener
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                http=timed_connection(config.receive_timeout_s),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=config.max_header_bytes + HEAD_SLACK_BYTES,
                timeout_graceful_shutdown=2 * FLUSH_S,  # a backstop: `stop` is faster
            )
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Serves from now on; the task ends when the server does."""
        self._task = asyncio.create_task(self._server.serve([self._listener]), name="http")
        return self._task

    @property
    def num_connections(self) -> int:
        """Connections that are open, whatever their clients do with them."""
        return len(self._server.server_state.connections)

    async def stop(self) -> None:
        """Closes the listener, gives open responses FLUSH_S to reach their readers."""
        if self._task is None:
            return
        self._server.should_exit = True
        await asyncio.wait({self._task}, timeout=FLUSH_S)
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()  # its reader reads nothing; the handler learns of it
        await asyncio.wait({self._task})
        self._task.result()
