"""A model twice as large as a memory limit: our disk tier beside llama.cpp's mapping of the file.

    PEERPY scripts/bench_memory_limit.py --packed DIR --gguf FILE --ours-python PYTHON
        [--limit 5GiB] [--repeats 5] [--out benchmarks/results]

Theory. Under a limit of half the model both engines read from disk, in every token, about the half
of the experts' bytes that memory does not hold: with random weights routing is uniform, and no
policy can do better than the share that fits. What is left to win is reading while computing, large
reads instead of page faults, and no copy in the page cache.

Both run in one memory cgroup (v1: memory.limit_in_bytes, v2: memory.max), alone and by turns, on
the same weights; the files leave the page cache before each run, because pages that another group
was charged for would be free. Tokens are drawn at random: a greedy output of random weights soon
repeats itself, and with it its experts. WARM tokens, then TOKENS are timed. Needs the right to
make a cgroup.

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
GROUP = "moeserve-bench"
WARM, TOKENS = 16, 48
NEARLY_UNIFORM = 100.0  # temperature
GIB = 1 << 30
#: what a process with torch takes beside weights and kv, found by asking it
OWN_BYTES = 700 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--ours-python", default=sys.executable)
    parser.add_argument("--limit-gib", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine", choices=("ours", "llama.cpp"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.engine is not None:
        run = run_ours if args.engine == "ours" else run_llama_cpp
        print(json.dumps(run(args)))
        return 0
    limit = int(args.limit_gib * GIB)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "llama.cpp": []}
    with memory_limit(limit) as tasks:
        for _ in range(args.repeats):
            for engine, results in runs.items():
                python = args.ours_python if engine == "ours" else sys.executable
                results.append(run_limited(python, engine, tasks, args))
                print(f"{engine}: {results[-1]['tokens_per_s']:.2f} tokens/s", flush=True)
    report = {
        "benchmark": "memory limit",
        "date": str(date.today()),
        "limit_bytes": limit,
        "gguf_bytes": args.gguf.stat().st_size,
        "threads": args.threads,
        "tokens_per_s": {
            name: statistics.median(r["tokens_per_s"] for r in results)
            for name, results in runs.items()
        },
        "runs": runs,
    }
    speeds = report["tokens_per_s"]
    report["ratio"] = speeds["ours"] / speeds["llama.cpp"]
    if args.out is not None:
        path = args.out / f"{date.today()}-memory-limit.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0


def run_limited(python: str, engine: str, tasks: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The engine in a process that has joined the group before it started."""
    for file in (args.gguf, *args.packed.glob("*.safetensors")):
        leave_page_cache(file)
    command = [python, *sys.argv, "--engine", engine]

    def join() -> None:
        tasks.write_text(str(os.getpid()))

    env = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=join, env=env
    )
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[Path]:
    """A cgroup with that limit; the file that takes the ids of its processes. PermissionError."""
    v1 = Path("/sys/fs/cgroup/memory")
    root, limit = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v1.parent, "memory.max")
    group = root / f"{GROUP}-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(num_bytes))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def leave_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig
    from moeserve.environment import tune_native_libraries

    tune_native_libraries()
    from moeserve.core import EngineRequest, SamplingParams
    from moeserve.engine.engine import Engine

    engine = Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(args.packed), context_tokens=1024),
            kv=KvConfig(num_blocks=64),
            experts=ExpertConfig(
                cpu_backend="native",
                num_threads=args.threads,
                host_memory_bytes=int(args.limit_gib * GIB) - OWN_BYTES,
                policy=args.policy,
            ),
        )
    )
    params = SamplingParams(
        max_tokens=WARM + TOKENS, temperature=NEARLY_UNIFORM, seed=1, ignore_eos=True
    )
    engine.add(EngineRequest(request_id="r", token_ids=[1], params=params))
    for _ in range(WARM):
        engine.step()
    before = engine.loaded.runtime.cache.counters.totals()
    begun = time.perf_counter()
    for _ in range(TOKENS):
        engine.step()
    seconds = time.perf_counter() - begun
    after = engine.loaded.runtime.cache.counters.totals()
    result = {
        "tokens_per_s": TOKENS / seconds,
        "notes": engine.info.notes,
        "peak_bytes": peak_bytes(),
        **{name: after[name] - before[name] for name in ("hits", "late", "misses")},
    }
    engine.close()
    return result


def run_llama_cpp(args: argparse.Namespace) -> dict[str, Any]:
    from peers.run_llama_cpp import LlamaCpp

    engine = LlamaCpp(args.gguf, args.threads)
    with engine._context(1) as context:  # the warm-up shall be of the same context
        draw = random.Random(1)
        for _ in range(WARM):
            context.extend([[draw.randrange(engine.vocab_size)]])
        begun = time.perf_counter()
        for _ in range(TOKENS):
            context.extend([[draw.randrange(engine.vocab_size)]])
        seconds = time.perf_counter() - begun
    return {"tokens_per_s": TOKENS / seconds, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Of this process, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
