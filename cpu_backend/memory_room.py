"""How much memory this process may still take before anything must leave memory for it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moeserve.cpu_backend.cgroup import CGROUP_ROOT, PROC_CGROUP, cgroup_memory_left
from moeserve.cpu_backend.machine import PROC, memory_left


class MemoryRoom(NamedTuple):
    """available_bytes: what the system would give, files that it only keeps for later making room.
    free_bytes: what it has without that."""

    available_bytes: int
    free_bytes: int


def memory_room(
    proc: Path = PROC, proc_cgroup: Path = PROC_CGROUP, cgroup_root: Path = CGROUP_ROOT
) -> MemoryRoom:
    """The least of what the machine and the process's control groups leave; nothing where the
    system does not say."""
    limits = memory_left(proc), cgroup_memory_left(proc_cgroup, cgroup_root)
    known = [limit for limit in limits if limit is not None]
    return MemoryRoom(
        min((available for available, _ in known), default=0),
        min((free for _, free in known), default=0),
    )
