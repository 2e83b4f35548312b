"""What is found out about the machine and the installation. Facts only; `problems` judges them."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from moeserve import __version__
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.backend import Demands
from moeserve.cpu_backend.cgroup import cgroup_cores, cgroup_memory_bytes
from moeserve.cpu_backend.choice import BACKENDS, TIMES_FILE
from moeserve.cpu_backend.ipex_backend import ipex_version
from moeserve.cpu_backend.machine import (
    PROC,
    SYS,
    allowed_cores,
    cpu_model,
    huge_page_mode,
    memory_bytes,
    numa_nodes,
)
from moeserve.cpu_backend.native_runtime import choose_isa
from moeserve.cpu_backend.threads import affinity_cores, plan_threads
from moeserve.environment import read_environment
from moeserve.planner.hardware import last_level_cache_bytes

READ_BYTES = 512 << 20
DOT_TYPES = ("f32", "bf16", "int8")


@dataclass(frozen=True)
class IsaLevel:
    """missing: what processor or kernel lack for it. built: this installation has its kernels."""

    name: str
    usable: bool
    built: bool
    missing: list[str]


@dataclass(frozen=True)
class Processor:
    """chosen: the ISA level that `--isa auto` takes, and why."""

    model: str
    isa_levels: list[IsaLevel]
    chosen: str
    reason: str


@dataclass(frozen=True)
class Cores:
    """allowed: numbers of the cores that affinity leaves. quota: of the cgroup, in cores; None: no
    limit. num_threads: that moeserve would compute with, and why. nodes: cores of each NUMA node.
    """

    online: int
    allowed: list[int]
    quota: float | None
    num_threads: int
    reason: str
    nodes: dict[int, list[int]]


@dataclass(frozen=True)
class Memory:
    """limit_bytes: of the cgroup, None: no limit. huge_pages: always, madvise or never.

    Total and available are None where the system does not say.
    """

    total_bytes: int | None
    available_bytes: int | None
    limit_bytes: int | None
    huge_pages: str | None


@dataclass(frozen=True)
class Speed:
    """Measured on the chosen ISA level. Bytes per second read from memory by 1 thread and by all;
    operations per second (a multiply-add is two) of all threads, by type of the factors.
    """

    read_one_thread: float
    read_all_threads: float
    num_threads: int
    dot_peak: dict[str, float]


@dataclass(frozen=True)
class Backend:
    """lacks: why it cannot be used, with the fix; None: it can."""

    name: str
    version: str | None
    lacks: str | None


@dataclass(frozen=True)
class Torch:
    """onednn: whether it was built with it. cuda: the version it was built for."""

    version: str
    onednn: bool
    cuda: str | None
    devices: list[str]


@dataclass(frozen=True)
class Facts:
    """speed: None where it was not asked for. packages: version by name, None: not installed.
    cache_error: why the directory that remembers measured times cannot be written, None: it can.
    """

    moeserve: str
    python: str
    system: str
    processor: Processor
    cores: Cores
    memory: Memory
    speed: Speed | None
    backends: list[Backend]
    torch: Torch
    packages: dict[str, str | None] = field(default_factory=dict)
    times_path: str = ""
    cache_error: str | None = None


def gather(quick: bool, sys: Path = SYS, proc: Path = PROC) -> Facts:
    """quick: without measuring speed, which takes a few seconds."""
    processor = _processor(proc)
    cores = _cores(sys, proc)
    memory = _memory(sys, proc)
    times_path = read_environment().cache_home / TIMES_FILE
    return Facts(
        moeserve=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        processor=processor,
        cores=cores,
        memory=memory,
        speed=None if quick else measure(processor.chosen, cores.num_threads, memory),
        backends=_backends(),
        torch=_torch(),
        packages=required_packages(),
        times_path=str(times_path),
        cache_error=_write_error(times_path.parent),
    )


def _processor(proc: Path) -> Processor:
    levels = [
        IsaLevel(level.name, level.usable, level.built, level.missing)
        for level in _native.isa_levels()
    ]
    chosen, reason = choose_isa("auto")
    return Processor(cpu_model(proc), levels, chosen, reason)


def _cores(sys: Path, proc: Path) -> Cores:
    quota = cgroup_cores(proc / "self" / "cgroup", sys / "fs" / "cgroup")
    plan = plan_threads(None, affinity_cores(), quota)
    return Cores(
        online=os.cpu_count() or 1,
        allowed=allowed_cores(),
        quota=quota,
        num_threads=plan.num_threads,
        reason=plan.reason,
        nodes=numa_nodes(sys),
    )


def _memory(sys: Path, proc: Path) -> Memory:
    total_bytes, available_bytes = memory_bytes(proc) or (None, None)
    limit_bytes = cgroup_memory_bytes(proc / "self" / "cgroup", sys / "fs" / "cgroup")
    return Memory(total_bytes, available_bytes, limit_bytes, huge_page_mode(sys))


def measure(isa: str, num_threads: int, memory: Memory) -> Speed:
    """A few seconds; reads READ_BYTES, more where a cache would hold a good part of them, and never
    more than an eighth of the memory that is there."""
    limits = [n for n in (memory.available_bytes, memory.limit_bytes) if n is not None]
    wanted = max(READ_BYTES, 4 * last_level_cache_bytes())
    num_bytes = min([wanted, *(limit // 8 for limit in limits)])
    one, together = _native.Runtime(isa, 1), _native.Runtime(isa, num_threads)
    return Speed(
        read_one_thread=one.measure_read_bandwidth(num_bytes),
        read_all_threads=together.measure_read_bandwidth(num_bytes),
        num_threads=num_threads,
        dot_peak={kind: together.measure_dot_peak(kind) for kind in DOT_TYPES},
    )


def _backends() -> list[Backend]:
    versions = {
        "native": __version__,
        "torch": str(torch.__version__),
        "ipex": ipex_version(),
    }
    demands = Demands(torch.float32)
    return [
        Backend(name, versions[name], backend.lacks(demands)) for name, backend in BACKENDS.items()
    ]


def _torch() -> Torch:
    devices = [
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    onednn = bool(torch.backends.mkldnn.is_available())
    return Torch(str(torch.__version__), onednn, torch.version.cuda, devices)


def required_packages() -> dict[str, str | None]:
    """Versions of what moeserve needs, by its own metadata; extras left out."""
    found: dict[str, str | None] = {}
    for requirement in metadata.requires("moeserve") or []:
        name = re.match(r"[\w.-]+", requirement)
        if name is None or "extra ==" in requirement:
            continue
        try:
            found[name[0]] = metadata.version(name[0])
        except metadata.PackageNotFoundError:
            found[name[0]] = None
    return found


def _write_error(directory: Path) -> str | None:
    """Why files cannot be made in a directory, or in the first above it that exists."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir():
        return f"{existing} is no directory"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written"
