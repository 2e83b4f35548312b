"""Settings, as frozen dataclasses. The only reader of the environment.

Every field is implemented or refused by name: a value that asks for a room whose content does not
exist yet raises ConfigError where the config is built, never later and never silently.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from moeserve.core import ConfigError

BUNDLED_MODEL = Path(__file__).resolve().parent / "assets" / "tiny-moe"


def _one_of(name: str, value: str, allowed: tuple[str, ...], fix: str = "") -> None:
    if value not in allowed:
        tail = f"; {fix}" if fix else ""
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(allowed)}{tail}", field=name)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name}: {value} is below the minimum {least}", field=name)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, in what precision, on what device."""

    #: local directory or hub id
    model: str = str(BUNDLED_MODEL)
    #: name that clients use; default: the last part of `model`
    served_name: str | None = None
    #: hub revision (branch, tag or commit)
    revision: str | None = None
    #: never reach the network
    offline: bool = False
    #: auto (what config.json says), float32, bfloat16, float16
    dtype: str = "auto"
    #: cpu, cuda or cuda:N
    device: str = "cpu"
    #: refuse NaN and Inf in the weights; reads them all
    check_weights: bool = False
    #: context length in tokens; default: the model's
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        index = self.device.removeprefix("cuda:")
        if self.device not in ("cpu", "cuda") and not (index != self.device and index.isdigit()):
            raise ConfigError(
                f"device: {self.device!r} is not one of cpu, cuda, cuda:N", field="device"
            )
        if self.context_tokens is not None:
            _at_least("context_tokens", self.context_tokens, 1)

    @property
    def name(self) -> str:
        return self.served_name or Path(self.model).name


@dataclass(frozen=True, kw_only=True)
class KvConfig:
    """The paged kv pool."""

    #: tokens in one block
    block_tokens: int = 16
    #: memory for kv; default: what max_running sequences of full context need, at most 1 GiB
    kv_bytes: int | None = None
    #: exact number of blocks, instead of kv_bytes
    num_blocks: int | None = None
    #: reuse blocks of equal prefixes across requests
    prefix_reuse: bool = True

    def __post_init__(self) -> None:
        _at_least("block_tokens", self.block_tokens, 1)
        if self.kv_bytes is not None and self.num_blocks is not None:
            raise ConfigError("kv_bytes and num_blocks contradict each other; give one")
        for name in ("kv_bytes", "num_blocks"):
            value = getattr(self, name)
            if value is not None:
                _at_least(name, value, 1)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Which tokens run in the next step."""

    #: token budget of a step, prefill and decode together
    max_batch_tokens: int = 512
    #: sequences that may run at once
    max_running: int = 64
    #: requests that may wait; more are refused as overloaded
    max_waiting: int = 1024
    #: past_future, aggressive or conservative
    admission: str = "past_future"
    #: finished requests whose output lengths past_future remembers
    history_requests: int = 1000

    def __post_init__(self) -> None:
        _one_of("admission", self.admission, ("past_future", "aggressive", "conservative"))
        for name in ("max_batch_tokens", "max_running", "max_waiting", "history_requests"):
            _at_least(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """Where experts live and run. Rooms without content yet are refused by name."""

    #: auto or torch
    cpu_backend: str = "auto"
    #: none (all experts are resident)
    predictor: str = "none"
    #: resident (every expert in the fast tier)
    policy: str = "resident"
    #: compute threads of the engine; default: the cores this process may use
    num_threads: int | None = None

    def __post_init__(self) -> None:
        later = "native and ipex come with the native CPU backend"
        _one_of("cpu_backend", self.cpu_backend, ("auto", "torch"), later)
        _one_of("predictor", self.predictor, ("none",), "predictors come with the expert cache")
        _one_of("policy", self.policy, ("resident",), "policies come with the expert cache")
        if self.num_threads is not None:
            _at_least("num_threads", self.num_threads, 1)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything one engine needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    experts: ExpertConfig = field(default_factory=ExpertConfig)


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """The OpenAI HTTP API."""

    #: address to listen on
    host: str = "127.0.0.1"
    #: TCP port; 0 picks a free one
    port: int = 8000
    #: bearer token asked for on every route but /health; None: open
    api_key: str | None = None
    #: largest request body
    max_body_bytes: int = 4 * 1024 * 1024
    #: largest request head (all headers together)
    max_header_bytes: int = 32 * 1024
    #: answers per request
    max_n: int = 16
    #: tokens per answer; None: the context length
    max_tokens_cap: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: {self.port} is not 0 to 65535", field="port")
        for name in ("max_body_bytes", "max_header_bytes", "max_n"):
            _at_least(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class ZmqConfig:
    """The ZeroMQ front."""

    #: endpoint to bind; default: ipc socket in the runtime directory
    endpoint: str | None = None
    #: directory made by `moeserve keygen`; needed for TCP beyond loopback
    curve_dir: Path | None = None
    #: seconds between heartbeats
    heartbeat_s: float = 2.0
    #: a peer silent for that long is gone, and its requests are cancelled
    peer_timeout_s: float = 10.0
    #: largest message, all frames together
    max_message_bytes: int = 16 * 1024 * 1024
    #: requests one client may have in flight
    max_in_flight: int = 256


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """The gateway process: fronts, limits, engine supervision."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    zmq: ZmqConfig = field(default_factory=ZmqConfig)
    #: directory for ipc sockets, made 0700; default: a fresh one per server
    runtime_dir: Path | None = None
    #: seconds that running requests get after SIGTERM
    drain_s: float = 30.0
    #: engine restarts allowed within ten minutes before the server gives up
    max_engine_restarts: int = 3


@dataclass(frozen=True)
class Environment:
    """What moeserve takes from the environment, read once."""

    api_key: str | None  # MOESERVE_API_KEY
    endpoint: str | None  # MOESERVE_ENDPOINT: where `moeserve request` and `chat` connect
    hf_token: str | None  # HF_TOKEN
    log_level: str  # MOESERVE_LOG_LEVEL
    data_home: Path  # XDG_DATA_HOME: chat history and saved chats
    runtime_home: Path  # XDG_RUNTIME_DIR, else the temporary directory


def read_environment() -> Environment:
    """The settings that come from outside the command line."""
    env = os.environ
    return Environment(
        api_key=env.get("MOESERVE_API_KEY") or None,
        endpoint=env.get("MOESERVE_ENDPOINT") or None,
        hf_token=env.get("HF_TOKEN") or None,
        log_level=env.get("MOESERVE_LOG_LEVEL", "info"),
        data_home=Path(env.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "moeserve",
        runtime_home=Path(env.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()),
    )


def default_endpoint(environment: Environment) -> str:
    """The ipc endpoint that a server binds and a client finds when nothing is named.

    One per user: the directory is private (0700), so the path cannot be squatted.
    """
    return f"ipc://{environment.runtime_home / f'moeserve-{os.getuid()}' / 'client.sock'}"
