"""What stands in the way of serving, or of serving fast, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moeserve.doctor.facts import Cores, Facts, Memory

GIB = 1 << 30


@dataclass(frozen=True)
class Problem:
    """fatal: moeserve cannot serve. Others cost speed or convenience."""

    fatal: bool
    what: str
    fix: str


def find_problems(facts: Facts) -> list[Problem]:
    """The fatal ones first."""
    found = [
        *_packages(facts),
        *_processor(facts),
        *_cores(facts.cores),
        *_memory(facts.memory),
        *_software(facts),
    ]
    return sorted(found, key=lambda problem: not problem.fatal)


def _packages(facts: Facts) -> Iterator[Problem]:
    for name, version in facts.packages.items():
        if version is None:
            yield Problem(True, f"{name} is not installed", f"pip install {name}")


def _processor(facts: Facts) -> Iterator[Problem]:
    processor = facts.processor
    for level in processor.isa_levels:
        if not level.built and not level.missing:
            yield Problem(
                False,
                f"this processor could run the {level.name} kernels, but they were not built",
                "pip install --force-reinstall --no-deps moeserve with GCC 12, Clang 15 or newer",
            )
    if processor.chosen == "scalar":
        yield Problem(
            False,
            f"only scalar kernels can run ({processor.reason}); a tenth of the speed or less",
            "use a machine with AVX2; in a virtual machine, pass the host's CPU model through",
        )


def _cores(cores: Cores) -> Iterator[Problem]:
    if cores.quota is not None and cores.quota < 1:
        yield Problem(
            False,
            f"the cgroup grants {cores.quota:g} cores: even one thread is stopped in every period",
            "raise the limit to whole cores (docker --cpus, systemd CPUQuota=, cpu.max)",
        )
    elif cores.quota is not None and cores.quota < len(cores.allowed):
        yield Problem(
            False,
            f"the cgroup grants {cores.quota:g} cores and affinity {len(cores.allowed)}: threads "
            "move between cores",
            "give the process whole cores of its own (docker --cpuset-cpus, taskset) and no quota",
        )
    used = [node for node, members in cores.nodes.items() if set(members) & set(cores.allowed)]
    if len(used) > 1:
        first = cores.nodes[used[0]]
        yield Problem(
            False,
            f"the cores are on {len(used)} NUMA nodes: threads read weights of the other nodes, "
            "too, at a part of the speed",
            "where the model fits into one node's memory: numactl "
            f"--cpunodebind={used[0]} --membind={used[0]} moeserve serve ({len(first)} cores)",
        )


def _memory(memory: Memory) -> Iterator[Problem]:
    limits = [n for n in (memory.available_bytes, memory.limit_bytes) if n is not None]
    if limits and min(limits) < GIB:
        which = (
            "the cgroup grants"
            if memory.limit_bytes is not None and memory.limit_bytes == min(limits)
            else "available are"
        )
        yield Problem(
            False,
            f"{which} {min(limits) / GIB:.2f} GiB of memory; weights and kv must fit in it",
            "free memory, or raise the limit (docker --memory, systemd MemoryMax=, memory.max)",
        )
    if memory.huge_pages == "never":
        yield Problem(
            False,
            "huge pages are off: reading weights waits for address translation",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )


def _software(facts: Facts) -> Iterator[Problem]:
    if not facts.torch.onednn:
        yield Problem(
            False,
            "torch was built without oneDNN: with --cpu-backend torch an answer depends on what "
            "else runs in its batch, and bfloat16 is slow",
            "pip install torch from PyPI or https://download.pytorch.org/whl/cpu",
        )
    for backend in facts.backends:
        if backend.lacks is not None and backend.version is not None:
            yield Problem(
                False,
                f"the {backend.name} backend cannot be used: {backend.lacks}",
                "mend or uninstall it",
            )
    if facts.cache_error is not None:
        yield Problem(
            False,
            f"--cpu-backend auto measures at every start: {facts.cache_error}",
            "make the directory writable, set XDG_CACHE_HOME, or name a --cpu-backend",
        )
