"""The machine as Linux describes it: processor, NUMA nodes, memory, huge pages.

Every function takes the root that it reads below, so that tests can give another machine's.
Elsewhere than on Linux the files are absent and the answers are empty.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

SYS = Path("/sys")
PROC = Path("/proc")


def allowed_cores() -> list[int]:
    """Numbers of the cores that this thread may be scheduled on; [] where the OS does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cpu_model(proc: Path = PROC) -> str:
    """The processor's name."""
    cpuinfo = proc / "cpuinfo"
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def parse_core_list(text: str) -> list[int]:
    """Cores as the kernel lists them, such as 0-3,8-11 (cpuset(7), "List format")."""
    cores: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return cores


def numa_nodes(sys: Path = SYS) -> dict[int, list[int]]:
    """The cores of every NUMA node; nodes of memory alone have none."""
    lists = (sys / "devices" / "system" / "node").glob("node[0-9]*/cpulist")
    nodes = {int(path.parent.name.removeprefix("node")): path for path in lists}
    return {node: parse_core_list(nodes[node].read_text()) for node in sorted(nodes)}


def node_first(cores: Sequence[int], nodes: Mapping[int, Sequence[int]]) -> list[int]:
    """The cores in the order in which threads are pinned to them: one node after the other.

    The node with most of the cores comes first, so that as many threads as fit there share its
    memory. Core numbers alone do not say: many machines deal them out to the nodes in turn.
    """
    node_of = {core: node for node, its_cores in nodes.items() for core in its_cores}
    sizes: dict[int, int] = {}
    for core in cores:
        sizes[node_of.get(core, -1)] = sizes.get(node_of.get(core, -1), 0) + 1

    def place(core: int) -> tuple[int, int, int]:
        node = node_of.get(core, -1)
        return -sizes[node], node, core

    return sorted(cores, key=place)


def huge_page_mode(sys: Path = SYS) -> str | None:
    """always, madvise or never: when memory is given in transparent huge pages; None: unknown."""
    setting = sys / "kernel" / "mm" / "transparent_hugepage" / "enabled"
    if not setting.is_file():
        return None
    found = re.search(r"\[(\w+)\]", setting.read_text())
    return found[1] if found else None


def memory_bytes(proc: Path = PROC) -> tuple[int, int] | None:
    """(total, available without swapping), None where the OS does not say."""
    kib = _meminfo_kib(proc)
    return None if kib is None else (kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024)


def memory_left(proc: Path = PROC) -> tuple[int, int] | None:
    """(available without swapping, free without taking it from the page cache) bytes, None where
    the OS does not say."""
    kib = _meminfo_kib(proc)
    return None if kib is None else (kib["MemAvailable"] * 1024, kib["MemFree"] * 1024)


def _meminfo_kib(proc: Path) -> dict[str, int] | None:
    meminfo = proc / "meminfo"
    if not meminfo.is_file():
        return None
    found = re.findall(r"^(\w+):\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    return {name: int(value) for name, value in found}
