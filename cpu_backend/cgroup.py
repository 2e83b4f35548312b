"""What the control groups of this process grant it. Reads versions 1 and 2 (cgroups(7))."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

PROC_CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")

#: version 1 writes the largest number of pages for "no limit"
_NO_LIMIT_BYTES = 1 << 60

T = TypeVar("T")


def cgroup_cores(proc_cgroup: Path = PROC_CGROUP, root: Path = CGROUP_ROOT) -> float | None:
    """CPU time per wall time that the process's cgroup and its ancestors grant; None: no limit.

    Reads cpu.max, or cpu.cfs_quota_us over cpu.cfs_period_us.
    """
    return _tightest("cpu", _cores, proc_cgroup, root)


def cgroup_memory_bytes(proc_cgroup: Path = PROC_CGROUP, root: Path = CGROUP_ROOT) -> int | None:
    """Memory that the process's cgroup and its ancestors grant; None: no limit.

    Reads memory.max, or memory.limit_in_bytes.
    """
    limit_bytes = _tightest("memory", _memory_bytes, proc_cgroup, root)
    return None if limit_bytes is None else int(limit_bytes)


def cgroup_memory_left(
    proc_cgroup: Path = PROC_CGROUP, root: Path = CGROUP_ROOT
) -> tuple[int, int] | None:
    """(available, free) bytes that the process may still take until its cgroup or an ancestor is at
    its limit: with files that the system only keeps for later making room, and without.

    None: no limit. Reads memory.current and memory.stat, or memory.usage_in_bytes and memory.stat.
    """
    found = list(_by_directory("memory", _memory_left, proc_cgroup, root))
    if not found:
        return None
    return min(available for available, _ in found), min(free for _, free in found)


def _tightest(
    controller: str, limit: Callable[[Path], float | None], proc_cgroup: Path, root: Path
) -> float | None:
    return min(_by_directory(controller, limit, proc_cgroup, root), default=None)


def _by_directory(
    controller: str, read: Callable[[Path], T | None], proc_cgroup: Path, root: Path
) -> Iterator[T]:
    """What `read` finds in the directories of the process's group and its ancestors."""
    if not proc_cgroup.is_file():
        return
    for line in proc_cgroup.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for directory in _ancestors(root / controllers if controllers else root, path):
            found = read(directory)
            if found is not None:
                yield found


def _ancestors(mount: Path, path: str) -> list[Path]:
    """The group's directory and those above it. A path from outside a container may not exist in
    it; the mount's own directory then is the group's."""
    inner = PurePosixPath(path.lstrip("/"))
    return [mount / part for part in (inner, *inner.parents)]


def _cores(directory: Path) -> float | None:
    version_2 = directory / "cpu.max"
    if version_2.is_file():
        quota, period = version_2.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    version_1 = directory / "cpu.cfs_quota_us"
    if version_1.is_file():
        quota_us = int(version_1.read_text())
        period_us = int((directory / "cpu.cfs_period_us").read_text())
        return None if quota_us < 0 else quota_us / period_us
    return None


def _memory_bytes(directory: Path) -> float | None:
    version_2 = directory / "memory.max"
    if version_2.is_file():
        text = version_2.read_text().strip()
        return None if text == "max" else int(text)
    version_1 = directory / "memory.limit_in_bytes"
    if version_1.is_file():
        limit_bytes = int(version_1.read_text())
        return None if limit_bytes >= _NO_LIMIT_BYTES else limit_bytes
    return None


def _memory_left(directory: Path) -> tuple[int, int] | None:
    limit_bytes = _memory_bytes(directory)
    if limit_bytes is None:
        return None
    used = directory / "memory.current"
    prefix = ""
    if not used.is_file():
        used, prefix = directory / "memory.usage_in_bytes", "total_"  # of the groups below, too
    counts = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    kept = sum(int(counts[f"{prefix}{kind}"]) for kind in ("active_file", "inactive_file"))
    free = max(0, int(limit_bytes) - int(used.read_text()))
    return free + kept, free
