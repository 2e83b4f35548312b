"""Where experts live and run, and who computes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeserve.config.fields import at_least, one_of, setting
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
    layer_floor: int = setting(
        0,
        "experts of each layer that keep room in their tier, once they have it, against what other "
        "layers want; default: all layers share all room, as the policy has it",
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
        None,
        "with --device cuda or emulated: memory for experts there; the others run on the CPU or "
        "are copied as they are wanted; default: with cuda all stand there",
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
    stall_spin_us: int = setting(
        20_000,
        "microseconds of a wait for experts from disk through which threads of the idle policy "
        "keep the cores from halting; 0: they halt",
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
        one_of("cpu_backend", self.cpu_backend, CPU_BACKENDS)
        one_of("policy", self.policy, POLICIES)
        one_of("predictor", self.predictor, PREDICTORS)
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
            if self.layer_floor > 0:
                raise ConfigError(
                    f"layer_floor: {self.layer_floor} experts keep room where not all have any",
                    field="layer_floor",
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
            ("layer_floor", 0),
        ):
            value = getattr(self, name)
            if value is not None:
                at_least(name, value, least)
        if self.num_threads is not None:
            at_least("num_threads", self.num_threads, 1)
        at_least("spin_us", self.spin_us, 0)
        at_least("stall_spin_us", self.stall_spin_us, 0)
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
        at_least("worker_heartbeat_s", self.worker_heartbeat_s, 0.01)
        at_least("worker_timeout_s", self.worker_timeout_s, 2 * self.worker_heartbeat_s)
        at_least("worker_job_s", self.worker_job_s, 0.01)
        at_least("worker_start_s", self.worker_start_s, 0.01)
        one_of("worker_absent", self.worker_absent, ("refuse", "go_on"))

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
