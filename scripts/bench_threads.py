"""Whether compute threads get in each other's way: context switches and speed beside a gateway.

    python scripts/bench_threads.py [--threads 2] [--streams 64] [--seconds 5] [--repeats 3]

About 3 minutes with the defaults (seven servers, each 8 s to start and 17 s of load), where nothing
else runs. The clients run in this process and take a share of a core, as the gateway does.

Theory. Compute threads as many as cores, and a gateway that streams to 64 clients, are more than
the cores can run at once; somebody is always put off. What that costs depends on who waits for
whom. With a barrier every thread waits for the one that was put off, and threads that spin
meanwhile keep it off its core: involuntary switches go up, tokens go down. The native threads take
items from a counter and have no barrier inside a region, and spin for `spin_us` before they sleep:
0 gives the core away at once and pays a wake-up per region (voluntary switches), 1000 holds it.
torch's OpenMP threads meet at a barrier at the end of every operator.

Rows: native with 0, 100 (the default) and 1000 us of spinning; with 100 us and every thread bound
to a core; with one thread; torch with as many threads, and with one. Columns: tokens per second
that arrived at the clients (the window of median speed); switches of all engine threads per
second, from /proc/PID/task/*/status: voluntary (it slept) and involuntary (it was put off); cores
that engine and gateway kept busy. Linux only. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from server_process import Server, running_server

from moeserve.client import AsyncClient
from moeserve.cpu_backend.machine import allowed_cores, cpu_model

PROMPTS = (
    "Once upon a time, there was a little girl named",
    "ROMEO:\nBut, soft! what light",
    "def read_lines(path):\n    ",
    "The dog saw a big red",
)
MAX_TOKENS = 200
WARM_UP_S = 2.0


@dataclass(frozen=True)
class Setup:
    """One row: how the engine computes."""

    backend: str
    threads: int
    spin_us: int | None = None  # None: the backend has no such setting
    pinned: bool = False

    @property
    def name(self) -> str:
        spin = "" if self.spin_us is None else f", spin {self.spin_us} us"
        return f"{self.backend}, {self.threads} threads{spin}{', pinned' if self.pinned else ''}"

    @property
    def flags(self) -> list[str]:
        spin = [] if self.spin_us is None else ["--spin-us", str(self.spin_us)]
        pin = ["--pin-threads"] if self.pinned else []
        threads = ["--num-threads", str(self.threads)]
        return ["--cpu-backend", self.backend, *threads, *spin, *pin]


@dataclass(frozen=True)
class Counts:
    """Running totals at one moment."""

    time_s: float
    tokens: int
    voluntary: int
    involuntary: int
    engine_cpu_s: float
    gateway_cpu_s: float


@dataclass(frozen=True)
class Rates:
    """Per second, between two moments."""

    tokens: float
    voluntary: float
    involuntary: float
    engine_cores: float
    gateway_cores: float


def setups(threads: int) -> list[Setup]:
    return [
        Setup("native", threads, 0),
        Setup("native", threads, 100),
        Setup("native", threads, 1000),
        Setup("native", threads, 100, pinned=True),
        Setup("native", 1, 100),
        Setup("torch", threads),
        Setup("torch", 1),
    ]


def switches(pid: int) -> tuple[int, int]:
    """Voluntary and involuntary context switches of the threads that a process has (proc(5))."""
    totals = {"voluntary_ctxt_switches": 0, "nonvoluntary_ctxt_switches": 0}
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        try:
            lines = status.read_text().splitlines()
        except FileNotFoundError:  # the thread has just ended
            continue
        for line in lines:
            name, _, value = line.partition(":")
            if name in totals:
                totals[name] += int(value)
    return totals["voluntary_ctxt_switches"], totals["nonvoluntary_ctxt_switches"]


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def engine_of(gateway: psutil.Process) -> psutil.Process:
    for child in gateway.children():
        if "moeserve.engine.process" in child.cmdline():
            return child
    raise RuntimeError("the gateway has no engine process")


@dataclass
class Received:
    """Tokens that arrived at the clients."""

    tokens: int = 0


def count(server: Server, received: Received) -> Counts:
    gateway = psutil.Process(server.process.pid)
    engine = engine_of(gateway)
    voluntary, involuntary = switches(engine.pid)
    return Counts(
        time.monotonic(), received.tokens, voluntary, involuntary, cpu_s(engine), cpu_s(gateway)
    )


def rates(before: Counts, after: Counts) -> Rates:
    elapsed_s = after.time_s - before.time_s
    first, last = asdict(before), asdict(after)
    del first["time_s"]
    return Rates(*((last[name] - value) / elapsed_s for name, value in first.items()))


async def keep_asking(client: AsyncClient, number: int, received: Received) -> None:
    """One stream after the other, until it is cancelled."""
    while True:
        prompt = PROMPTS[number % len(PROMPTS)]
        async with client.stream(prompt, max_tokens=MAX_TOKENS, ignore_eos=True) as stream:
            async for chunk in stream:
                received.tokens += len(chunk.token_ids)


async def measure(server: Server, args: argparse.Namespace) -> list[Rates]:
    received = Received()
    async with AsyncClient(server.zmq) as client:
        streams = [
            asyncio.create_task(keep_asking(client, number, received))
            for number in range(args.streams)
        ]
        await asyncio.sleep(WARM_UP_S)
        moments = [count(server, received)]
        for _ in range(args.repeats):
            await asyncio.sleep(args.seconds)
            moments.append(count(server, received))
        ended = [task for task in streams if task.done()]
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    for task in ended:
        task.result()  # raises what the stream raised
    return [rates(before, after) for before, after in pairwise(moments)]


def median(measured: Sequence[Rates]) -> Rates:
    """Of the window whose tokens are the median, so that the figures belong together."""
    middle = statistics.median_low([window.tokens for window in measured])
    return next(window for window in measured if window.tokens == middle)


def table(results: dict[str, Rates]) -> str:
    lines = [
        "| | tokens/s | voluntary/s | involuntary/s | engine cores | gateway cores |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {r.tokens:.0f} | {r.voluntary:.0f} | {r.involuntary:.0f} "
        f"| {r.engine_cores:.2f} | {r.gateway_cores:.2f} |"
        for name, r in results.items()
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="directory or hub id (default: the bundled model)")
    parser.add_argument("--threads", type=int, default=len(allowed_cores()))
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not Path("/proc/self/status").is_file():
        print("bench_threads: needs Linux' /proc", file=sys.stderr)
        return 2
    results: dict[str, Rates] = {}
    for setup in setups(args.threads):
        if args.only not in setup.name:
            continue
        print(f"{setup.name} ...", file=sys.stderr, flush=True)
        with running_server(*setup.flags, model=args.model) as server:
            results[setup.name] = median(asyncio.run(measure(server, args)))
    print(table(results))
    report: dict[str, Any] = {
        "benchmark": "threads",
        "date": date.today().isoformat(),
        "machine": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        "model": args.model or "bundled",
        "streams": args.streams,
        "seconds": args.seconds,
        "repeats": args.repeats,
        "results": {name: asdict(result) for name, result in results.items()},
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
