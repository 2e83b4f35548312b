"""The gateway with its two fronts."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from moeserve.config.engine import EngineConfig
from moeserve.config.fields import at_least, setting
from moeserve.core import ConfigError


def _host_name(name: str, value: str) -> None:
    if re.fullmatch(r"[\w.-]+", value):
        return
    try:
        ipaddress.IPv6Address(value.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ConfigError(
            f"{name}: {value!r} is no host name or address",
            field=name,
            hint="leave out http:// and the port",
        ) from None


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """The OpenAI HTTP API."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "TCP port; 0 picks a free one")
    api_key: str | None = setting(
        None, "bearer token asked for on every route but /health; None: open"
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "name, as in the Host header, that the server answers to besides localhost and its "
        "address; repeatable; checked if there is no key or a name is given",
    )
    max_body_bytes: int = setting(4 * 1024 * 1024, "largest request body")
    max_header_bytes: int = setting(32 * 1024, "largest request head (all headers together)")
    body_timeout_s: float = setting(60.0, "seconds a body may stall while it arrives")
    receive_timeout_s: float = setting(
        120.0, "seconds in which the head of a request must have arrived, and its body after that"
    )
    max_prompts: int = setting(256, "prompts in one request to /v1/completions")
    max_n: int = setting(16, "answers per request")
    max_tokens_cap: int | None = setting(None, "tokens per answer; None: the context length")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: {self.port} is not 0 to 65535", field="port")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("api_key: it is empty; give a key, or leave it out to serve openly")
        for host in self.allowed_hosts:
            _host_name("allowed_hosts", host)
        for name in ("max_body_bytes", "max_header_bytes", "max_prompts", "max_n"):
            at_least(name, getattr(self, name), 1)
        at_least("body_timeout_s", self.body_timeout_s, 0.1)
        at_least("receive_timeout_s", self.receive_timeout_s, 0.1)


@dataclass(frozen=True, kw_only=True)
class ZmqConfig:
    """The ZeroMQ front."""

    endpoint: str | None = setting(
        None, "endpoint to bind; default: ipc socket in the runtime directory"
    )
    curve_dir: Path | None = setting(
        None, "directory made by `moeserve keygen`; needed for TCP beyond loopback"
    )
    heartbeat_s: float = setting(2.0, "seconds between heartbeats")
    peer_timeout_s: float = setting(
        10.0, "a peer silent for that long is gone, and its requests are cancelled"
    )
    max_message_bytes: int = setting(16 * 1024 * 1024, "largest message, all frames together")
    max_in_flight: int = setting(256, "requests one client may have in flight")

    def __post_init__(self) -> None:
        at_least("heartbeat_s", self.heartbeat_s, 0.01)
        if self.peer_timeout_s < 2 * self.heartbeat_s:
            raise ConfigError(
                f"peer_timeout_s: {self.peer_timeout_s} is below two heartbeats of "
                f"{self.heartbeat_s} s, so that one late message would end a session",
                field="peer_timeout_s",
                hint="raise it, or lower --heartbeat-s",
            )
        at_least("max_message_bytes", self.max_message_bytes, 1024)
        at_least("max_in_flight", self.max_in_flight, 1)


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """The gateway process: fronts, limits, engine supervision."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    zmq: ZmqConfig = field(default_factory=ZmqConfig)
    runtime_dir: Path | None = setting(
        None,
        "directory for ipc sockets, made 0700; default: a fresh one per server, and for the "
        "clients' socket the one where they look",
    )
    drain_s: float = setting(30.0, "seconds that running requests get after SIGTERM")
    max_engine_restarts: int = setting(
        3, "engine restarts allowed within ten minutes before the server gives up"
    )
    local_workers: int = setting(
        0,
        "expert workers to run on this machine, which share all experts; takes a model written by "
        "`moeserve pack`",
    )
    local_worker_threads: int | None = setting(
        None, "compute threads of each local worker; default: the cores divided among them"
    )

    def __post_init__(self) -> None:
        at_least("drain_s", self.drain_s, 0)
        at_least("max_engine_restarts", self.max_engine_restarts, 0)
        at_least("local_workers", self.local_workers, 0)
        if self.local_worker_threads is not None:
            at_least("local_worker_threads", self.local_worker_threads, 1)
        if self.local_workers and self.engine.experts.workers:
            raise ConfigError(
                "local_workers: they hold all experts, and workers holds some, too",
                field="local_workers",
                hint="give --local-workers or --worker",
            )
