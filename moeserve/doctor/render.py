"""The report on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moeserve.doctor.facts import Backend, Cores, Facts, IsaLevel, Memory, Processor, Speed
from moeserve.doctor.problems import Problem

Row = tuple[str, str]


def show(console: Console, facts: Facts, problems: Sequence[Problem]) -> None:
    section = _Sections(console)
    section("moeserve", [("version", facts.moeserve), ("Python", facts.python)])
    section("processor", _processor(facts))
    section("cores", _cores(facts.cores))
    section("memory", _memory(facts.memory))
    if facts.speed is not None:
        section("speed", _speed(facts.speed))
    section("CPU backends", [(each.name, _backend(each)) for each in facts.backends])
    section("torch", _torch(facts))
    section("packages", [(name, version or "missing") for name, version in facts.packages.items()])
    show_verdict(console, problems)


def show_verdict(console: Console, problems: Sequence[Problem]) -> None:
    """The problems and whether moeserve can serve."""
    console.print()
    for problem in problems:
        mark, style = ("✗", "bold red") if problem.fatal else ("!", "yellow")
        console.print(Text.assemble((f"{mark} ", style), problem.what))
        console.print(Padding(Text(problem.fix, style="cyan"), (0, 0, 0, 4)))
    if any(problem.fatal for problem in problems):
        console.print(Text("moeserve cannot serve here", style="bold red"))
    else:
        rest = f", {len(problems)} thing(s) to mend" if problems else ""
        console.print(Text.assemble(("✓ ", "bold green"), f"moeserve can serve here{rest}"))


class _Sections:
    """Prints titled tables of names and values."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, title: str, rows: Iterable[Row]) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", min_width=16)
        table.add_column()
        for name, value in rows:
            table.add_row(name, Text(value))
        self._console.print(Text(title, style="bold"))
        self._console.print(Padding(table, (0, 0, 0, 2)))


def _processor(facts: Facts) -> list[Row]:
    processor = facts.processor
    rows = [("model", processor.model), ("system", facts.system)]
    rows += [(level.name, _level(level, processor)) for level in processor.isa_levels]
    return rows


def _level(level: IsaLevel, processor: Processor) -> str:
    if level.usable:
        return f"yes, chosen: {processor.reason}" if level.name == processor.chosen else "yes"
    lacks = f"no: lacks {', '.join(level.missing)}" if level.missing else "no"
    return lacks if level.built else f"{lacks}; not in this build"


def _cores(cores: Cores) -> list[Row]:
    quota = "no limit" if cores.quota is None else f"{cores.quota:g} cores"
    rows = [
        ("online", str(cores.online)),
        ("allowed", f"{len(cores.allowed)}: {core_list(cores.allowed)}"),
        ("cgroup quota", quota),
        ("compute threads", f"{cores.num_threads} ({cores.reason})"),
    ]
    for node, members in cores.nodes.items():
        usable = [core for core in members if core in cores.allowed]
        part = "" if usable == members else f", {len(usable)} allowed"
        rows.append((f"NUMA node {node}", f"{core_list(members) or 'no cores'}{part}"))
    return rows


def core_list(cores: Sequence[int]) -> str:
    """Core numbers as the kernel writes them: 0-3,8."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1][1:] = [core]
        else:
            runs.append([core])
    return ",".join("-".join(map(str, run)) for run in runs)


def _memory(memory: Memory) -> list[Row]:
    def gib(num_bytes: int | None, absent: str) -> str:
        return absent if num_bytes is None else f"{num_bytes / 2**30:.1f} GiB"

    return [
        ("total", gib(memory.total_bytes, "unknown")),
        ("available", gib(memory.available_bytes, "unknown")),
        ("cgroup limit", gib(memory.limit_bytes, "no limit")),
        ("huge pages", memory.huge_pages or "unknown"),
    ]


def _speed(speed: Speed) -> list[Row]:
    rows = [("read, 1 thread", f"{speed.read_one_thread / 1e9:.1f} GB/s")]
    if speed.num_threads > 1:
        rows.append(
            (f"read, {speed.num_threads} threads", f"{speed.read_all_threads / 1e9:.1f} GB/s")
        )
    return rows + [
        (f"products, {kind}", f"{per_s / 1e9:.0f} G operations/s")
        for kind, per_s in speed.dot_peak.items()
    ]


def _backend(backend: Backend) -> str:
    if backend.lacks is None:
        return f"yes, {backend.version}"
    return f"no: {backend.lacks}"


def _torch(facts: Facts) -> list[Row]:
    torch = facts.torch
    built = f" (built for {torch.cuda})" if torch.cuda else " (built without)"
    devices = [(f"CUDA device {i}", name) for i, name in enumerate(torch.devices)]
    return [
        ("version", torch.version),
        ("oneDNN", "yes" if torch.onednn else "no"),
        *(devices or [("CUDA", f"no device{built}")]),
    ]
