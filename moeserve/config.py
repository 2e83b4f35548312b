"""Settings, as frozen dataclasses.

Every field is implemented or refused by name: a value that asks for a room whose content does not
exist yet raises ConfigError where the config is built, never later and never silently.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeserve.core import ConfigError
from moeserve.endpoints import is_loopback, tcp_host

CPU_BACKENDS = ("auto", "native", "torch", "ipex")
POLICIES = ("auto", "resident", "lru", "lfu", "mrs", "least_stale", "score")
PREDICTORS = (
    "auto",
    "none",
    "frequency",
    "markov",
    "gate_lookahead",
    "gate_residual",
    "pregate",
)
TRAINED_PREDICTORS = ("gate_residual", "pregate")
QUANTIZE_GROUPS = (32, 64, 128, "auto")
BUNDLED_MODEL = Path(__file__).resolve().parent / "assets" / "tiny-moe"


def setting(default: Any, text: str) -> Any:
    """A dataclass field with its one line of documentation, which is also the help of its flag."""
    return field(default=default, metadata={"help": text})


def _one_of(name: str, value: str, allowed: tuple[str, ...], fix: str = "") -> None:
    if value not in allowed:
        tail = f"; {fix}" if fix else ""
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(allowed)}{tail}", field=name)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name}: {value} is below the minimum {least}", field=name)


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


def _worker_endpoint(endpoint: str, has_keys: bool) -> None:
    if endpoint.startswith("ipc:///"):
        return
    if not endpoint.startswith("tcp://"):
        raise ConfigError(
            f"workers: {endpoint!r} is neither ipc:///PATH nor tcp://HOST:PORT", field="workers"
        )
    if not is_loopback(tcp_host(endpoint)) and not has_keys:
        raise ConfigError(
            f"workers: {endpoint} is beyond this machine and there are no CURVE keys",
            field="workers",
            hint="run `moeserve keygen DIR` at the worker, copy client.key_secret and server.key, "
            "and give --worker-curve-dir",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, in what precision, on what device."""

    model: str = setting(str(BUNDLED_MODEL), "local directory or hub id")
    served_name: str | None = setting(
        None, "name that clients use; default: the last part of `model`"
    )
    revision: str | None = setting(None, "hub revision (branch, tag or commit)")
    offline: bool = setting(False, "never reach the network")
    dtype: str = setting("auto", "auto (what config.json says), float32, bfloat16, float16")
    device: str = setting(
        "cpu",
        "cpu, cuda or cuda:N; emulated: experts as on a device that is not there, at its speed",
    )
    quantize: str = setting(
        "none", "none, int8 or int4: the weights of products on the CPU, rounded as they are read"
    )
    quantize_group: int | str = setting(
        32, "int4: inputs that share a scale: 32, 64, 128, or auto: for each matrix by its error"
    )
    quantize_zero_points: bool = setting(False, "int4: a zero point for every group, too")
    quantize_head: str = setting(
        "int8", "with int4: int8 or int4 for the output head, whose errors go into the logits"
    )
    quantize_activations: bool | None = setting(
        None,
        "multiply int8, int4 and mxfp4 weights in integers, inputs rounded to int8 per token; "
        "default: with --quantize, and not for the codes that a checkpoint comes with",
    )
    check_weights: bool = setting(False, "refuse NaN and Inf in the weights; reads them all")
    context_tokens: int | None = setting(None, "context length in tokens; default: the model's")

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _one_of("quantize", self.quantize, ("none", "int8", "int4"))
        if self.quantize_group not in QUANTIZE_GROUPS:
            raise ConfigError(
                f"quantize_group: {self.quantize_group!r} is not one of 32, 64, 128, auto",
                field="quantize_group",
            )
        _one_of("quantize_head", self.quantize_head, ("int8", "int4"))
        for name, default in (
            ("quantize_group", 32),
            ("quantize_zero_points", False),
            ("quantize_head", "int8"),
        ):
            value = getattr(self, name)
            if value != default and self.quantize != "int4":
                raise ConfigError(
                    f"{name}: {value} is for weights of --quantize int4, not {self.quantize}",
                    field=name,
                    hint="leave it out, or give --quantize int4",
                )
        index = self.device.removeprefix("cuda:")
        known = self.device in ("cpu", "cuda", "emulated")
        if not known and not (index != self.device and index.isdigit()):
            raise ConfigError(
                f"device: {self.device!r} is not one of cpu, cuda, cuda:N, emulated",
                field="device",
            )
        if self.context_tokens is not None:
            _at_least("context_tokens", self.context_tokens, 1)

    @property
    def name(self) -> str:
        return self.served_name or Path(self.model).name


@dataclass(frozen=True, kw_only=True)
class KvConfig:
    """The paged kv pool."""

    block_tokens: int = setting(16, "tokens in one block")
    kv_bytes: int | None = setting(
        None,
        "memory for kv; default: what max_running sequences of full context need, at most 1 GiB, "
        "and at most half of what host_memory_bytes leaves beside the weights of every token",
    )
    num_blocks: int | None = setting(None, "exact number of blocks, instead of kv_bytes")
    prefix_reuse: bool = setting(True, "reuse blocks of equal prefixes across requests")

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

    max_batch_tokens: int = setting(512, "token budget of a step, prefill and decode together")
    max_running: int = setting(64, "sequences that may run at once")
    max_waiting: int = setting(1024, "requests that may wait; more are refused as overloaded")
    admission: str = setting("past_future", "past_future, aggressive or conservative")
    history_requests: int = setting(
        1000, "finished requests whose output lengths past_future remembers"
    )
    overtaking: int = setting(
        16, "smaller requests that may start before one that kv has no room for; 0: strict order"
    )
    decode_group: int | None = setting(
        None, "most decodes in a step, chosen to want the same experts; default: all of them"
    )
    decode_wait_steps: int = setting(
        4, "with decode_group: steps that a decode may be left out in a row, if turns allow"
    )

    def __post_init__(self) -> None:
        _one_of("admission", self.admission, ("past_future", "aggressive", "conservative"))
        for name in ("max_batch_tokens", "max_running", "max_waiting", "history_requests"):
            _at_least(name, getattr(self, name), 1)
        if self.decode_group is not None:
            _at_least("decode_group", self.decode_group, 1)
        for name in ("overtaking", "decode_wait_steps"):
            _at_least(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """Where experts live and run."""

    cpu_backend: str = setting(
        "auto", "auto (the fastest, measured once), native (our own kernels), torch or ipex"
    )
    isa: str = setting(
        "auto", "instruction set of the native kernels: scalar, avx2, avx512, …; auto: the fastest"
    )
    host_memory_bytes: int | None = setting(
        None,
        "memory for all weights and kv together; experts that do not fit stay on disk and are read "
        "as they are wanted, which takes a model written by `moeserve pack`; default: no limit",
    )
    host_slots: int | None = setting(
        None, "exact number of experts in memory, instead of host_memory_bytes"
    )
    min_host_slots: int = setting(
        2, "with host_memory_bytes: experts that keep room in memory however much kv grows"
    )
    policy: str = setting(
        "auto",
        "which expert leaves memory for another: lru, lfu, mrs, least_stale or score; resident "
        "where all have room; auto: resident, else score",
    )
    predictor: str = setting(
        "none",
        "which experts to read ahead: none, frequency, markov, gate_lookahead, gate_residual or "
        "pregate; auto: gate_residual or else pregate where its file is beside the model, without "
        "one markov over the disk and gate_lookahead over host memory; none where all experts are "
        "resident",
    )
    predictor_file: Path | None = setting(
        None,
        "what `moeserve predictors train` wrote, for gate_residual, or `moeserve convert "
        "--pregate`, for pregate; default: predictors.safetensors or pregate.safetensors, beside "
        "the model",
    )
    prefetch_depth: int | None = setting(
        None,
        "layers that a predictor looks ahead, at most; default: 6 with markov and pregate, else 2",
    )
    disk_threads: int | None = setting(
        None, "threads that read experts from disk; default: as many as read fastest, measured"
    )
    device_memory_bytes: int | None = setting(
        None, "--device emulated: memory for experts there; the others run on the CPU or are copied"
    )
    device_slots: int | None = setting(
        None, "exact number of experts on the device, instead of device_memory_bytes"
    )
    device_profile: str = setting(
        "rtx4090-pcie4",
        "--device emulated: the machine whose device and link are emulated: a profile's file, or "
        "the name of one that comes with the package",
    )
    emulate_cpu: bool = setting(
        False,
        "--device emulated: the CPU's time follows from the profile, too, so that its ratios hold",
    )
    num_threads: int | None = setting(
        None, "compute threads of the engine; default: the cores this process may use"
    )
    pin_threads: bool = setting(False, "bind every compute thread to a core of its own")
    spin_us: int = setting(
        100, "microseconds that a compute thread without work looks for more before it sleeps"
    )
    huge_pages: bool = setting(
        True,
        "move the weights of a packed model from the page cache into huge pages of memory, piece "
        "by piece after the start, where the cache has them in small ones and memory is free",
    )

    workers: tuple[str, ...] = setting(
        (),
        "endpoint of a `moeserve worker`, which computes the experts that it holds; repeatable; "
        "takes a model written by `moeserve pack`",
    )
    worker_curve_dir: str | None = setting(
        None, "directory with client.key_secret and server.key, for workers beyond loopback"
    )
    worker_heartbeat_s: float = setting(1.0, "seconds between heartbeats to a worker")
    worker_timeout_s: float = setting(5.0, "a worker silent for that long is gone")
    worker_job_s: float = setting(
        60.0, "a worker that computes one layer for longer is gone, although it answers heartbeats"
    )
    worker_shared_memory: bool = setting(
        True, "rows for workers on this machine lie in memory that they map, not in messages"
    )
    worker_start_s: float = setting(30.0, "seconds to wait for all workers at the start")
    worker_absent: str = setting(
        "refuse",
        "a worker that is not there in that time: refuse to start, or go_on without it until it "
        "comes; an engine that is started again after a crash goes on",
    )

    def __post_init__(self) -> None:
        _one_of("cpu_backend", self.cpu_backend, CPU_BACKENDS)
        _one_of("policy", self.policy, POLICIES)
        _one_of("predictor", self.predictor, PREDICTORS)
        if self.predictor_file is not None and self.predictor not in TRAINED_PREDICTORS:
            raise ConfigError(
                f"predictor_file: {self.predictor!r} takes none",
                field="predictor_file",
                hint="choose --predictor gate_residual or pregate, or leave it out",
            )
        if self.host_memory_bytes is not None and self.host_slots is not None:
            raise ConfigError("host_memory_bytes and host_slots contradict each other; give one")
        if self.device_memory_bytes is not None and self.device_slots is not None:
            raise ConfigError(
                "device_memory_bytes and device_slots contradict each other; give one"
            )
        if not self.is_tiered and not self.has_device_slots:
            for name, default in (("policy", "auto"), ("predictor", "none")):
                value = getattr(self, name)
                if value not in (default, "auto", "resident"):
                    raise ConfigError(
                        f"{name}: {value!r} is for experts that do not all fit",
                        field=name,
                        hint="give --host-memory, or leave it out",
                    )
        if self.prefetch_depth is not None and self.predictor == "none":
            raise ConfigError(
                f"prefetch_depth: {self.prefetch_depth} layers, and nothing predicts them",
                field="prefetch_depth",
                hint="give --predictor, or leave it out",
            )
        if self.min_host_slots != 2 and self.host_memory_bytes is None:
            raise ConfigError(
                f"min_host_slots: {self.min_host_slots} are kept of what kv and experts share",
                field="min_host_slots",
                hint="give --host-memory, or leave it out",
            )
        for name, least in (
            ("host_memory_bytes", 1),
            ("host_slots", 2),
            ("disk_threads", 1),
            ("prefetch_depth", 1),
            ("device_memory_bytes", 1),
            ("device_slots", 1),
            ("min_host_slots", 2),
        ):
            value = getattr(self, name)
            if value is not None:
                _at_least(name, value, least)
        if self.num_threads is not None:
            _at_least("num_threads", self.num_threads, 1)
        _at_least("spin_us", self.spin_us, 0)
        self._check_workers()

    def _check_workers(self) -> None:
        if self.worker_curve_dir is not None and not self.workers:
            raise ConfigError(
                f"worker_curve_dir: {self.worker_curve_dir} holds keys of workers, and there are"
                " none",
                field="worker_curve_dir",
                hint="give --worker, or leave it out",
            )
        for endpoint in self.workers:
            _worker_endpoint(endpoint, self.worker_curve_dir is not None)
            if self.workers.count(endpoint) > 1:
                raise ConfigError(f"workers: {endpoint} is named twice", field="workers")
        _at_least("worker_heartbeat_s", self.worker_heartbeat_s, 0.01)
        _at_least("worker_timeout_s", self.worker_timeout_s, 2 * self.worker_heartbeat_s)
        _at_least("worker_job_s", self.worker_job_s, 0.01)
        _at_least("worker_start_s", self.worker_start_s, 0.01)
        _one_of("worker_absent", self.worker_absent, ("refuse", "go_on"))

    @property
    def layers_ahead(self) -> int:
        """prefetch_depth, or what suits the predictor. Chances of markov and pregate hardly fall
        with the distance, and a read from disk takes two to three layers' time; predictors that
        look at hidden states are right about the next layers only (docs/log.md)."""
        return self.prefetch_depth or (6 if self.predictor in ("markov", "pregate") else 2)

    @property
    def is_tiered(self) -> bool:
        """Whether memory for experts is limited."""
        return self.host_memory_bytes is not None or self.host_slots is not None

    @property
    def tier_policy(self) -> str:
        """Of a tier that holds fewer experts than there are."""
        return "score" if self.policy == "auto" else self.policy

    @property
    def has_device_slots(self) -> bool:
        """Whether some of the experts have copies on a device."""
        return self.device_memory_bytes is not None or self.device_slots is not None


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything one engine needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    experts: ExpertConfig = field(default_factory=ExpertConfig)

    def __post_init__(self) -> None:
        check_device(self.model, self.experts)


def check_device(model: ModelConfig, experts: ExpertConfig) -> None:
    """ConfigError for settings of an emulated device without one, or one without settings."""
    if model.device == "emulated" and not experts.has_device_slots:
        raise ConfigError(
            "device: emulated: how many experts have room there?",
            field="device",
            hint="give --device-memory or --device-slots",
        )
    if model.device == "emulated" and experts.cpu_backend not in ("auto", "native"):
        raise ConfigError(
            f"cpu_backend: {experts.cpu_backend}: an emulated device computes with native kernels",
            field="cpu_backend",
            hint="choose --cpu-backend native",
        )
    if model.device != "emulated":
        for name, default in (
            ("device_memory_bytes", None),
            ("device_slots", None),
            ("device_profile", ExpertConfig.device_profile),
            ("emulate_cpu", False),
        ):
            if getattr(experts, name) != default:
                raise ConfigError(
                    f"{name}: it is for an emulated device, and device is {model.device}",
                    field=name,
                    hint="give --device emulated, or leave it out",
                )


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
            _at_least(name, getattr(self, name), 1)
        _at_least("body_timeout_s", self.body_timeout_s, 0.1)


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
        _at_least("heartbeat_s", self.heartbeat_s, 0.01)
        if self.peer_timeout_s < 2 * self.heartbeat_s:
            raise ConfigError(
                f"peer_timeout_s: {self.peer_timeout_s} is below two heartbeats of "
                f"{self.heartbeat_s} s, so that one late message would end a session",
                field="peer_timeout_s",
                hint="raise it, or lower --heartbeat-s",
            )
        _at_least("max_message_bytes", self.max_message_bytes, 1024)
        _at_least("max_in_flight", self.max_in_flight, 1)


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
        _at_least("drain_s", self.drain_s, 0)
        _at_least("max_engine_restarts", self.max_engine_restarts, 0)
        _at_least("local_workers", self.local_workers, 0)
        if self.local_worker_threads is not None:
            _at_least("local_worker_threads", self.local_worker_threads, 1)
        if self.local_workers and self.engine.experts.workers:
            raise ConfigError(
                "local_workers: they hold all experts, and workers holds some, too",
                field="local_workers",
                hint="give --local-workers or --worker",
            )
