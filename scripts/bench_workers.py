"""Expert workers on one host: what it costs to have another process compute, and what it gives.

    python scripts/bench_workers.py [PACKED] [--rows 1,8] [--tokens 64] [--repeats 3]
        [--threads N] [--out benchmarks/results]

Theory. On one host with one memory controller a worker adds neither cores nor bandwidth: decode is
bound by reading experts from memory, whoever reads. So 0 workers is the best that one and two can
come to, and what they lack is the price of the exchange, per MoE layer and step:

    exchange = (step with workers - step without) / MoE layers
             = message there and back + threads that wake + rows and results copied

Messages take a few dozen microseconds on a Unix socket, and as much on loopback; copies count for
many rows only (rows * top_k * hidden * (2 + 4) bytes per layer), twice in frames (into the socket
and out of it) and not at all beyond one write in shared memory. A second NUMA node or another host
adds its own bandwidth B2, and is worth it once (bytes of its experts per layer and step) *
(1 / B1 - 1 / (B1 + B2)) is more than the exchange.

How. Decode of --rows sequences at once, all experts in memory, greedy, random prompts of 16 tokens;
WARM steps, then --tokens are timed. With workers they hold all experts (shard I/N), each with
N_threads / workers threads (the engine has all, and waits while they compute). `shared`: ipc and
shared memory; `tcp`: 127.0.0.1 and frames, as to another host. Cases run by turns, each engine in a
process of its own; the tokens must be the same in all. Without PACKED: the bundled model, int4.
About 20 s per case and repeat with it.

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from moeserve.config import (
    BUNDLED_MODEL,
    EngineConfig,
    ExpertConfig,
    KvConfig,
    ModelConfig,
    SchedulerConfig,
)
from moeserve.cpu_backend.machine import allowed_cores, cpu_model

#: workers and how rows travel
CASES = ((0, "-"), (1, "shared"), (1, "tcp"), (2, "shared"), (2, "tcp"))
PROMPT_TOKENS = 16
WARM = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--rows", default="1,8", help="sequences that decode at once")
    parser.add_argument("--tokens", type=int, default=64, help="timed, of each sequence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=max(1, len(allowed_cores())))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.case is not None:
        print(json.dumps(run_engine(args.model, args.threads, args.tokens, json.loads(args.case))))
        return 0
    rows = [int(count) for count in args.rows.split(",")]
    with tempfile.TemporaryDirectory(prefix="moeserve-") as directory:
        model = args.model or pack_bundled(Path(directory) / "packed")
        report = measure(args, model, Path(directory), rows)
    if args.out is not None:
        path = args.out / f"{date.today()}-workers.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0


def pack_bundled(out: Path) -> Path:
    from moeserve.models.pack import pack_model

    return pack_model(ModelConfig(model=str(BUNDLED_MODEL), quantize="int4"), out).path


def measure(
    args: argparse.Namespace, model: Path, directory: Path, rows: Sequence[int]
) -> dict[str, Any]:
    runs: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for _ in range(args.repeats):  # by turns, so that a drifting machine is unfair to none
        for count, way in CASES:
            with workers(model, directory, count, way, args.threads) as endpoints:
                for num_rows in rows:
                    case = {"workers": endpoints, "shared": way == "shared", "rows": num_rows}
                    result = run_alone(model, args, case)
                    runs.setdefault((count, way, num_rows), []).append(result)
                    speed = result["tokens_per_s"]
                    print(f"{count} workers {way}, {num_rows} rows: {speed:.1f} tokens/s")
                    sys.stdout.flush()
    return summarise(args, runs)


@contextmanager
def workers(
    model: Path, directory: Path, count: int, way: str, num_threads: int
) -> Iterator[list[str]]:
    """Gives the endpoints of workers that listen."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                one_worker(
                    model,
                    "tcp://127.0.0.1:*" if way == "tcp" else f"ipc://{directory}/run/{index}.sock",
                    f"{index}/{count}",
                    max(1, num_threads // count),
                )
            )
            for index in range(count)
        ]


@contextmanager
def one_worker(model: Path, endpoint: str, shard: str, num_threads: int) -> Iterator[str]:
    command = [sys.executable, "-m", "moeserve.cli", "worker", str(model), "--shard", shard]
    command += ["--endpoint", endpoint, "--num-threads", str(num_threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("worker: "):
            raise RuntimeError(f"no worker: {line!r}, exit status {process.wait()}")
        yield line.rsplit(" ", 1)[1].strip()
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def run_alone(model: Path, args: argparse.Namespace, case: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, sys.argv[0], str(model), "--threads", str(args.threads)]
    command += ["--tokens", str(args.tokens), "--case", json.dumps(case)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def run_engine(
    model: Path, num_threads: int, num_tokens: int, case: dict[str, Any]
) -> dict[str, Any]:
    """Decodes; times, and what workers said, of the timed steps."""
    from moeserve.core import EngineRequest, SamplingParams
    from moeserve.engine.engine import Engine

    num_rows = case["rows"]
    engine = Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(model), context_tokens=1024),
            kv=KvConfig(num_blocks=num_rows * 64),
            scheduler=SchedulerConfig(max_batch_tokens=512),
            experts=ExpertConfig(
                cpu_backend="native",
                num_threads=num_threads,
                workers=tuple(case["workers"]),
                worker_shared_memory=case["shared"],
            ),
        )
    )
    rng = random.Random(0)
    params = SamplingParams(max_tokens=WARM + num_tokens + 1, temperature=0, ignore_eos=True)
    for row in range(num_rows):
        prompt = [rng.randrange(engine.info.vocab_size) for _ in range(PROMPT_TOKENS)]
        engine.add(EngineRequest(request_id=str(row), token_ids=prompt, params=params))
    tokens: dict[str, list[int]] = {}

    def step() -> None:
        for delta in engine.step():
            assert delta.error is None, delta.error
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)

    for _ in range(1 + WARM):
        step()
    before = pool_totals(engine)
    begun = time.perf_counter()
    for _ in range(num_tokens):
        step()
    took_s = time.perf_counter() - begun
    after = pool_totals(engine)
    result = {
        "tokens_per_s": num_tokens * num_rows / took_s,
        "step_ms": took_s / num_tokens * 1e3,
        "num_moe_layers": engine.info.num_moe_layers,
        "tokens": sorted(tokens.items()),
        **{name: (after[name] - before[name]) / num_tokens for name in after},
    }
    engine.close()
    return result


def pool_totals(engine: Any) -> dict[str, float]:
    """Of all workers: bytes to and fro, seconds that they computed and that steps waited."""
    pool = engine.stats(fresh=True).experts.pool
    if pool is None:
        return {"bytes_per_step": 0, "busy_s_per_step": 0, "wait_s_per_step": 0}
    return {
        "bytes_per_step": sum(w.sent_bytes + w.received_bytes for w in pool.workers),
        "busy_s_per_step": sum(w.busy_s for w in pool.workers),
        "wait_s_per_step": pool.wait_s,
    }


def summarise(
    args: argparse.Namespace, runs: dict[tuple[int, str, int], list[dict[str, Any]]]
) -> dict[str, Any]:
    table: list[dict[str, Any]] = []
    for (count, way, num_rows), results in runs.items():
        alone = runs[(*CASES[0], num_rows)]
        if any(result["tokens"] != alone[0]["tokens"] for result in results):
            raise RuntimeError(f"{count} workers, {way}, {num_rows} rows: other tokens than alone")
        speeds = [result["tokens_per_s"] for result in results]
        step_ms = statistics.median(result["step_ms"] for result in results)
        alone_ms = statistics.median(result["step_ms"] for result in alone)
        names = ("bytes_per_step", "busy_s_per_step", "wait_s_per_step")
        table.append(
            {
                "workers": count,
                "rows_travel": way,
                "rows": num_rows,
                "tokens_per_s": statistics.median(speeds),
                "spread": [min(speeds), max(speeds)],
                "exchange_us_per_layer": (step_ms - alone_ms) * 1e3 / results[0]["num_moe_layers"],
                **{name: statistics.median(r[name] for r in results) for name in names},
            }
        )
    return {
        "benchmark": "workers",
        "date": str(date.today()),
        "machine": cpu_model(),
        "model": str(args.model or "the bundled model, int4"),
        "threads": args.threads,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "table": table,
    }


if __name__ == "__main__":
    sys.exit(main())
