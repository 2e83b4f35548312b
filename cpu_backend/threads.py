"""How many threads this process should compute with, and making the libraries keep to it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from threadpoolctl import threadpool_limits

from moeserve.core import ConfigError
from moeserve.cpu_backend.cgroup import cgroup_cores

logger = logging.getLogger(__name__)


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


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """torch computes with so many threads meanwhile.

    One where native threads compute, in an engine as in what is measured for one: after every
    operation that torch has shared out, its own threads spin for milliseconds (GOMP_SPINCOUNT), on
    the cores that the native ones need.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
