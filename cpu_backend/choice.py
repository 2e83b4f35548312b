"""Which backend computes experts on the CPU, and why that one."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from moeserve import __version__
from moeserve.config import ExpertConfig
from moeserve.core import ConfigError
from moeserve.cpu_backend.backend import CpuBackend, Demands
from moeserve.cpu_backend.cgroup import cgroup_cores
from moeserve.cpu_backend.ipex_backend import IpexBackend, ipex_version
from moeserve.cpu_backend.machine import cpu_model
from moeserve.cpu_backend.measurement import (
    MeasurementFailed,
    layer_weights,
    measure_in_own_process,
    measure_layer_ms,
    score_ms,
)
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.cpu_backend.native_runtime import NativeRuntime, choose_isa
from moeserve.cpu_backend.remembered import Machine, Measured, recall, remember
from moeserve.cpu_backend.threads import affinity_cores, plan_threads, torch_threads
from moeserve.cpu_backend.torch_backend import TorchBackend
from moeserve.environment import read_environment

logger = logging.getLogger(__name__)

BACKENDS: Mapping[str, type[CpuBackend]] = MappingProxyType(
    {"native": NativeBackend, "torch": TorchBackend, "ipex": IpexBackend}
)
#: the file of measured times in the user's cache directory
TIMES_FILE = "cpu-backend.json"


@dataclass(frozen=True)
class BackendChoice:
    """What experts on the CPU run on, and why. native: where it is the native backend."""

    backend: CpuBackend
    reason: str
    native: NativeRuntime | None


def choose_backend(
    config: ExpertConfig, demands: Demands, times_path: Path | None = None
) -> BackendChoice:
    """The backend that config.cpu_backend names, or for `auto` the fastest for these demands.

    `auto` measures once per machine and remembers in times_path (None: in the user's cache
    directory). Logs what was chosen. Raises ConfigError for a backend that cannot run the model,
    and for an ISA level that cannot run here.
    """
    name, why = config.cpu_backend, "asked for"
    if name == "auto":
        path = times_path or read_environment().cache_home / TIMES_FILE
        name, why = _fastest(config, demands, path)
    else:
        lack = BACKENDS[name].lacks(demands)
        if lack is not None:
            raise ConfigError(
                f"cpu_backend: {name!r} cannot run this model: {lack}",
                field="cpu_backend",
                hint="--cpu-backend auto takes one that can",
            )
    made = make_backend(name, config)
    runtime = "" if made.native is None else f"; {made.native.reason}"
    reason = f"{name} ({why}){runtime}"
    logger.info("cpu backend: %s", reason)
    return BackendChoice(made.backend, reason, made.native)


def make_backend(name: str, config: ExpertConfig) -> BackendChoice:
    """The backend of that name, with a runtime of its own where it needs one."""
    if name == "native":
        runtime = NativeRuntime(config.num_threads, config.isa, config.pin_threads, config.spin_us)
        return BackendChoice(NativeBackend(runtime), name, runtime)
    return BackendChoice(IpexBackend() if name == "ipex" else TorchBackend(), name, None)


def _fastest(config: ExpertConfig, demands: Demands, path: Path) -> tuple[str, str]:
    """The name of the fastest backend that can run the model, and the reason."""
    lacks = {name: backend.lacks(demands) for name, backend in BACKENDS.items()}
    able = [name for name, lack in lacks.items() if lack is None]
    excluded = "".join(
        f"; {name} is out: {lack}"
        for name, lack in lacks.items()
        if lack is not None and (name != "ipex" or ipex_version() is not None)
    )
    if len(able) == 1:
        return able[0], f"auto: the only one for this model{excluded}"
    machine = _machine(config, demands.dtype)
    measured = recall(path, machine)
    if measured is None or not set(able) <= {*measured.layer_ms, *measured.failed}:
        measured = _measure(able, config, demands.dtype, machine)
        remember(path, measured)
    scores = {name: score_ms(measured.layer_ms[name]) for name in able if name in measured.layer_ms}
    ranked = sorted(scores, key=scores.__getitem__)
    best = ranked[0]
    ratios = ", ".join(f"{scores[name] / scores[best]:.1f}x {name}" for name in ranked[1:])
    failed = "".join(f"; not measured: {error}" for error in measured.failed.values())
    why = f"measured {ratios} on this machine on {measured.date}" if ratios else "auto"
    return best, f"{why}{failed}{excluded}"


def _machine(config: ExpertConfig, dtype: torch.dtype) -> Machine:
    return Machine(
        cpu=cpu_model(),
        isa=choose_isa(config.isa)[0],
        num_threads=plan_threads(config.num_threads, affinity_cores(), cgroup_cores()).num_threads,
        dtype=str(dtype).removeprefix("torch."),
        moeserve=__version__,
        torch=str(torch.__version__),
        ipex=ipex_version(),
    )


def _measure(
    names: Sequence[str], config: ExpertConfig, dtype: torch.dtype, machine: Machine
) -> Measured:
    logger.info("cpu backend: measuring %s, once on this machine", ", ".join(names))
    layer_ms: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    weights = layer_weights(dtype)
    for name in names:
        try:
            if name == "ipex":
                layer_ms[name] = measure_in_own_process(name, dtype, machine.num_threads)
                continue
            # Not pinned: this thread would stay where it was put, and torch's threads with it.
            unpinned = ExpertConfig(
                num_threads=machine.num_threads, isa=machine.isa, spin_us=config.spin_us
            )
            with torch_threads(1 if name == "native" else machine.num_threads):
                backend = make_backend(name, unpinned).backend
                layer_ms[name] = measure_layer_ms(backend, weights)
                backend.close()
        except MeasurementFailed as error:
            failed[name] = str(error)
    today = datetime.date.today().isoformat()
    return Measured(machine=machine, date=today, layer_ms=layer_ms, failed=failed)
