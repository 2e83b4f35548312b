"""What the control groups of this process grant it. Reads versions 1 and 2 (cgroups(7))."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

PROC_CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")

#: version 1 writes the largest number of pages for "no limit"
_NO_LIMIT_BYTES = 1 << 60


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


def _tightest(
    controller: str, limit: Callable[[Path], float | None], proc_cgroup: Path, root: Path
) -> float | None:
    if not proc_cgroup.is_file():
        return None
    limits = []
    for line in proc_cgroup.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for directory in _ancestors(root / controllers if controllers else root, path):
            found = limit(directory)
            if found is not None:
                limits.append(found)
    return min(limits, default=None)


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
