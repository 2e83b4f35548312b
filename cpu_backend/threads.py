"""How many threads this process should compute with, and making the libraries keep to it."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from threadpoolctl import threadpool_limits

from moeserve.core import ConfigError

logger = logging.getLogger(__name__)

PROC_CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ThreadPlan:
    """num_threads to compute with, and why that many."""

    num_threads: int
    reason: str


def affinity_cores() -> int:
    """Cores that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # platforms without affinity


def cgroup_cores(proc_cgroup: Path = PROC_CGROUP, root: Path = CGROUP_ROOT) -> float | None:
    """CPU time per wall time that the process's cgroup and its ancestors grant; None: no limit.

    Reads version 2 (cpu.max) and version 1 (cpu.cfs_quota_us over cpu.cfs_period_us).
    """
    if not proc_cgroup.is_file():
        return None
    limits: list[float] = []
    for line in proc_cgroup.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for directory in _ancestors(root / controllers if controllers else root, path):
            limits += _limit(directory)
    return min(limits, default=None)


def _ancestors(mount: Path, path: str) -> list[Path]:
    """The group's directory and those above it. A path from outside a container may not exist in
    it; the mount's own directory then is the group's."""
    inner = PurePosixPath(path.lstrip("/"))
    return [mount / part for part in (inner, *inner.parents)]


def _limit(directory: Path) -> list[float]:
    """[cores] that this one cgroup directory grants, or []."""
    version_2 = directory / "cpu.max"
    if version_2.is_file():
        quota, period = version_2.read_text().split()
        return [] if quota == "max" else [int(quota) / int(period)]
    version_1 = directory / "cpu.cfs_quota_us"
    if version_1.is_file():
        quota_us = int(version_1.read_text())
        period_us = int((directory / "cpu.cfs_period_us").read_text())
        return [] if quota_us < 0 else [quota_us / period_us]
    return []


def plan_threads(requested: int | None, allowed: int, quota: float | None) -> ThreadPlan:
    """The plan for `allowed` cores under a cgroup quota. ConfigError where requested is below 1.

    A quota is rounded down: a thread more than it grants is stopped in every period, and whoever
    waits for that thread with it.
    """
    if requested is not None and requested < 1:
        raise ConfigError(f"num_threads: {requested} is below the minimum 1", field="num_threads")
    granted = allowed if quota is None else min(allowed, max(1, math.floor(quota)))
    limit = "" if quota is None else f", cgroup quota {quota:g}"
    cores = f"{allowed} cores allowed{limit}"
    if requested is None:
        return ThreadPlan(granted, cores)
    excess = f"; more than the {granted} it can run at once" if requested > granted else ""
    return ThreadPlan(requested, f"asked for; {cores}{excess}")


def use_threads(requested: int | None) -> ThreadPlan:
    """Makes torch compute with the planned number of threads and BLAS libraries of others with one.

    Process-wide; for the start of an engine process. Returns (and logs) the plan.
    """
    plan = plan_threads(requested, affinity_cores(), cgroup_cores())
    torch.set_num_threads(plan.num_threads)
    threadpool_limits(limits=1, user_api="blas")
    logger.info("compute threads: %d (%s)", plan.num_threads, plan.reason)
    return plan
