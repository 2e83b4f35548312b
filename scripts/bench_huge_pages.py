"""What small pages cost a packed model, and what moving it into huge ones costs and gains.

    python scripts/bench_huge_pages.py PACKED [--rounds 12] [--threads N]

Theory. A decode step streams the weights of the chosen experts once. Through 4 KiB pages every 64
lines of 64 bytes need an address translated anew, which the prefetchers do not cross; through 2 MiB
pages next to none do. So the bytes per second of a step differ, though the bytes do not.

Measured: decode of one stream, greedy. Three engines on the same files run in turns, in blocks of
STEPS steps at the same positions: one whose mapping is kept in small pages (whatever the page cache
has), one with what the page cache has, and one like the first whose pages were moved. Ratios are
medians over the rounds of (block : block of the small pages beside it), so that other work on the
machine falls on all. Before that: how long moving takes while nothing runs, and what a step takes
while it goes on beside. Needs memory for the model twice: in the page cache, and moved.

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.cpu_backend.machine import cpu_model
from moeserve.engine.engine import Engine
from moeserve.models import registry
from moeserve.models.page_mover import PageMover

WARM = 40
STEPS = 12
NO_HUGE_PAGES = mock.patch.object(registry, "mapped_advice", return_value=mmap.MADV_NOHUGEPAGE)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, metavar="PACKED")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    small, start_s = start(args.model, args.threads, NO_HUGE_PAGES)
    print(f"start: {start_s:.2f} s", flush=True)
    cached, _ = start(args.model, args.threads, nullcontext())
    moved, _ = start(args.model, args.threads, NO_HUGE_PAGES)
    engines = {"small": small, "cached": cached, "moved": moved}
    num_steps = WARM + args.rounds * STEPS
    for engine in engines.values():
        begin(engine, num_steps)
        for _ in range(WARM):
            engine.step()
    report = {"cpu": cpu_model(), "threads": args.threads, **move(moved, small, num_steps)}
    each: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(args.rounds):
        for name in sorted(engines, reverse=number % 2 == 1):
            each[name].append(block_ms(engines[name]))
    for name, times in each.items():
        ratio = statistics.median(t / s for t, s in zip(times, each["small"], strict=True))
        report[name] = {"ms": statistics.median(times), "best_ms": min(times), "ratio": ratio}
        print(
            f"{name:8s} {statistics.median(times):7.2f} ms a step, best {min(times):.2f};"
            f" {ratio:.3f} of small pages"
        )
    print(json.dumps(report))
    for engine in engines.values():
        engine.close()
    return 0


def start(
    model: Path, threads: int, advice: AbstractContextManager[object]
) -> tuple[Engine, float]:
    """An engine whose pages nobody moves yet, and the seconds that it took to start."""
    config = EngineConfig(
        model=ModelConfig(model=str(model), context_tokens=1024),
        kv=KvConfig(num_blocks=64),
        experts=ExpertConfig(cpu_backend="native", num_threads=threads, huge_pages=False),
    )
    began_s = time.perf_counter()
    with advice:
        engine = Engine.from_config(config)
    return engine, time.perf_counter() - began_s


def begin(engine: Engine, num_tokens: int) -> None:
    params = SamplingParams(max_tokens=num_tokens + 200, temperature=0, ignore_eos=True)
    engine.add(EngineRequest(request_id="timed", token_ids=[1, 2, 3], params=params))


def block_ms(engine: Engine) -> float:
    """Median of a block of steps; the first finds caches cold and is left out."""
    times = []
    for _ in range(STEPS):
        began_s = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - began_s) * 1e3)
    return statistics.median(times[1:])


def move(moved: Engine, small: Engine, num_steps: int) -> dict[str, object]:
    """Moves the one engine's pages: the first seconds beside steps of the other, then alone."""
    busy = True
    mover = PageMover(moved.loaded.mapped, is_busy=lambda: busy)
    alone = [block_ms(small) for _ in range(3)]
    mover.start()
    beside = [block_ms(small) for _ in range(3)]
    stats = mover.stats()
    assert stats is not None
    beside_gb, beside_s = stats.moved_bytes / 1e9, stats.seconds
    busy = False
    mover.wait()
    stats = mover.stats()
    assert stats is not None
    gb_per_s = (stats.moved_bytes / 1e9 - beside_gb) / (stats.seconds - beside_s)
    print(
        f"moving: {stats.moved_bytes / 1e9:.2f} GB; beside steps {beside_gb / beside_s:.2f} GB/s, a"
        f" step {min(beside):.2f} ms instead of {min(alone):.2f}; else {gb_per_s:.2f} GB/s"
        f" {stats.problem}",
        flush=True,
    )
    return {
        "moved_gb": stats.moved_bytes / 1e9,
        "beside_gb_per_s": beside_gb / beside_s,
        "alone_gb_per_s": gb_per_s,
        "step_beside_ms": min(beside),
        "step_alone_ms": min(alone),
    }


if __name__ == "__main__":
    sys.exit(main())
