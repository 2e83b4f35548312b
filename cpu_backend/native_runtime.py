"""The native kernels of this machine and the threads that run them."""

from __future__ import annotations

import logging
import os

from moeserve.core import ConfigError
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.threads import affinity_cores, cgroup_cores, plan_threads

logger = logging.getLogger(__name__)

#: how long a thread without work spins before it sleeps: longer than the gap between two layers,
#: shorter than anybody would notice on a shared machine
SPIN_US = 100


def choose_isa(name: str) -> tuple[str, str]:
    """The ISA level and the reason for it. `auto`: the fastest that may run here.

    Raises ConfigError for a level that is unknown or that this machine cannot run.
    """
    levels = _native.isa_levels()
    usable = [level.name for level in levels if level.usable]
    if name == "auto":
        better = [level for level in levels if level.built and not level.usable]
        lacks = ", ".join(better[0].missing) if better else ""
        return usable[-1], f"{better[0].name} needs {lacks}" if better else "the fastest built"
    for level in levels:
        if level.name == name and level.usable:
            return name, "asked for"
        if level.name == name:
            lacks = ", ".join(level.missing) if level.built else "a build that has it"
            raise ConfigError(
                f"isa: {name!r} cannot run on this machine, which lacks {lacks}",
                field="isa",
                hint=f"choose auto or one of {', '.join(usable)}",
            )
    raise ConfigError(f"isa: {name!r} is not one of auto, {', '.join(usable)}", field="isa")


class NativeRuntime:
    """One set of compute threads for all products of an engine. handle: what `_native` takes."""

    def __init__(
        self, num_threads: int | None = None, isa: str = "auto", pin: bool = False
    ) -> None:
        """num_threads: None for as many as this process may use. pin: every thread to a core of
        its own, also the calling one, which must be the one that will run the engine.

        Raises ConfigError.
        """
        plan = plan_threads(num_threads, affinity_cores(), cgroup_cores())
        name, isa_reason = choose_isa(isa)
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        pinned = pin and plan.num_threads <= len(cpus)
        chosen = cpus[: plan.num_threads] if pinned else []
        self.num_threads = plan.num_threads
        self.isa = name
        self.reason = (
            f"{name} ({isa_reason}), {plan.num_threads} threads"
            f"{' on cores ' + ', '.join(map(str, chosen)) if pinned else ''} ({plan.reason})"
        )
        self.handle = _native.Runtime(name, plan.num_threads, chosen, SPIN_US)
        if pinned:
            _native.pin_this_thread(chosen[0])
        logger.info("native kernels: %s", self.reason)
