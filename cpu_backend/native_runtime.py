"""The native kernels of this machine and the threads that run them."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moeserve.config import ExpertConfig
from moeserve.core import ConfigError
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.cgroup import cgroup_cores
from moeserve.cpu_backend.isa_check import wrong_products
from moeserve.cpu_backend.isa_speed import slow_pairs
from moeserve.cpu_backend.machine import allowed_cores, node_first, numa_nodes
from moeserve.cpu_backend.threads import affinity_cores, plan_threads

logger = logging.getLogger(__name__)

#: of rows at once: from about here on malloc's memory comes from the system anew each time, either
#: as a mapping or at the end of a heap that had been cut
POOLED_BYTES = 1 << 17


def choose_isa(name: str) -> tuple[str, str]:
    """The ISA level and the reason for it. `auto`: the fastest that may run here.

    Raises ConfigError for a level that is unknown or that this machine cannot run.
    """
    levels = _native.isa_levels()
    usable = [level.name for level in levels if level.usable]
    if name == "auto":
        return _fastest(levels)
    for level in levels:
        if level.name == name and level.usable:
            wrong = wrong_products(name)
            if wrong:
                raise ConfigError(
                    f"isa: {name!r} computes wrongly on this machine: {wrong[0]}",
                    field="isa",
                    hint="choose auto, and report it with the output of `moeserve doctor`",
                )
            return name, "asked for"
        if level.name == name:
            lacks = ", ".join(level.missing) if level.built else "a build that has it"
            raise ConfigError(
                f"isa: {name!r} cannot run on this machine, which lacks {lacks}",
                field="isa",
                hint=f"choose auto or one of {', '.join(usable)}",
            )
    raise ConfigError(f"isa: {name!r} is not one of auto, {', '.join(usable)}", field="isa")


def _fastest(levels: list[_native.IsaLevel]) -> tuple[str, str]:
    """The fastest level that runs here and computes what the plain one computes."""
    reason = "the fastest built"
    for level in reversed(levels):
        if not level.built:
            continue
        if not level.usable:
            reason = f"{level.name} needs {', '.join(level.missing)}"
            continue
        slow = slow_pairs(level.name)
        if slow is not None:
            reason = slow
            continue
        wrong = [] if level.name == "scalar" else wrong_products(level.name)
        if not wrong:
            return level.name, reason
        reason = f"{level.name} computes wrongly on this machine: {wrong[0]}"
        logger.error("isa: %s; please report it", reason)
    raise AssertionError("the scalar level runs everywhere")


class NativeRuntime:
    """One set of compute threads for all products of an engine. handle: what `_native` takes."""

    def __init__(
        self,
        num_threads: int | None = None,
        isa: str = "auto",
        pin: bool = False,
        spin_us: int = ExpertConfig.spin_us,
    ) -> None:
        """num_threads: None for as many as this process may use. pin: every thread to a core of
        its own, one NUMA node after the other; also the calling one, which must be the one that
        will run the engine. Not done where there are more threads than cores. spin_us: how long a
        thread without work looks for more before it sleeps.

        Raises ConfigError.
        """
        plan = plan_threads(num_threads, affinity_cores(), cgroup_cores())
        name, isa_reason = choose_isa(isa)
        cores = node_first(allowed_cores(), numa_nodes()) if pin else []
        pinned = cores[: plan.num_threads] if plan.num_threads <= len(cores) else []
        place = f" on cores {', '.join(map(str, pinned))}" if pinned else ""
        if pin and not pinned:
            place = f", not pinned because only {len(cores)} cores are allowed"
        self.num_threads = plan.num_threads
        self.isa = name
        self.reason = f"{name} ({isa_reason}), {plan.num_threads} threads{place} ({plan.reason})"
        self._cores = pinned or allowed_cores()[: plan.num_threads]
        self.handle = _native.Runtime(name, plan.num_threads, pinned, spin_us)
        self._row_pool = _native.RowPool()
        if pinned:
            _native.pin_this_thread(pinned[0])
        logger.debug("native kernels: %s", self.reason)

    def empty_rows(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[num_rows, width] for numbers that live for moments, with whatever stands there. Large
        ones take memory again that others have had: fresh pages cost more than writing them."""
        num_bytes = num_rows * width * dtype.itemsize
        if num_bytes < POOLED_BYTES:
            return torch.empty(num_rows, width, dtype=dtype)
        memory = torch.from_numpy(self._row_pool.take(num_bytes))
        return memory.view(dtype).view(num_rows, width)

    def awake(self, most_us: int) -> AbstractContextManager[object]:
        """`with` it around waits, time and again: cores are kept from halting for so long of each
        (csrc/core_waker.h). Not where cores are rationed, and this would take from the ration."""
        reason = _why_not_awake(most_us)
        if reason is None:
            try:
                return _native.CoreWaker(self._cores, most_us)
            except (ValueError, RuntimeError) as error:
                reason = str(error)
        logger.info("cores are not kept awake through stalls: %s", reason)
        return nullcontext()


def _why_not_awake(most_us: int) -> str | None:
    if most_us == 0:
        return "not asked for"
    quota, allowed = cgroup_cores(), affinity_cores()
    if quota is None or quota >= allowed:
        return None
    return f"the cgroup grants the time of {quota:g} of {allowed} cores"
