"""Decode and prefill speed of the engine beside transformers, same checkpoint, same run.

    python scripts/bench_decode.py [--model DIR] [--device cuda] [--repeats 5] [--out DIR]

Theory. A decode step of batch 1 reads every active weight once, so its bound is bytes over memory
bandwidth; the script measures the bandwidth (a sum over a buffer far larger than the caches) and
reports the bound of the model beside what was reached. For a model of a few MiB, which lies in
cache, that bound is far away and the step is made of operator overhead: the ratio to transformers,
which pays the same per operator, is the figure to look at.

Medians of --repeats after one warm-up. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from moeserve.config import BUNDLED_MODEL, EngineConfig, ExpertConfig, ModelConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.engine.engine import Engine

NEW_TOKENS = 64
PREFILL_TOKENS = 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_MODEL))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="directory for the result, named by date")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    args = parser.parse_args()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    engine = Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=args.model, device=args.device, dtype=args.dtype),
            experts=ExpertConfig(num_threads=args.threads),
        )
    )
    figures = measure_engine(engine, args.repeats)
    if not args.no_peer:
        peer = measure_transformers(args.model, engine, args.repeats)
        figures |= {f"transformers_{name}": value for name, value in peer.items()}
        figures |= {f"ratio_{name}": figures[name] / value for name, value in peer.items()}
    report: dict[str, Any] = {
        "model": engine.info.name,
        "parameters": engine.info.num_parameters,
        "dtype": engine.info.dtype,
        "device": engine.info.device,
        "machine": machine(args.threads, torch.device(args.device)),
        "tokens_per_s": {name: round(value, 2) for name, value in figures.items()},
    }
    for name, value in figures.items():
        print(f"{name:40s} {value:10.1f}")
    if args.out:
        path = args.out / f"{date.today()}-decode.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0


def machine(threads: int, device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    facts: dict[str, Any] = {}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts = {"gpu": card.name, "gpu_memory_gib": round(card.total_memory / 2**30, 1)}
        facts |= {"multiprocessors": card.multi_processor_count, "cuda": torch.version.cuda}
    return {
        **facts,
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "read_bandwidth_gb_s": round(read_bandwidth(device) / 1e9, 1),
    }


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of summing 2 GiB of the device's memory, best of five."""
    data = torch.ones(1 << 29, device=device)
    return data.nbytes / min(timed(lambda: data.sum().item()) for _ in range(5))


def timed(call: Callable[[], Any]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def median_rate(tokens: int, call: Callable[[], Any], repeats: int) -> float:
    call()
    return tokens / statistics.median(timed(call) for _ in range(repeats))


def measure_engine(engine: Engine, repeats: int) -> dict[str, float]:
    counter = iter(range(1_000_000))

    def run(streams: int, prompt_tokens: int, new_tokens: int) -> None:
        params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        for _ in range(streams):
            # A first token of its own keeps prefix reuse out of the prefill figure.
            first = next(counter) % engine.info.vocab_size
            ids = [first] + [7] * (prompt_tokens - 1)
            engine.add(EngineRequest(request_id=f"r{next(counter)}", token_ids=ids, params=params))
        while engine.has_work:
            engine.step()

    figures = {}
    for streams in (1, 16):
        figures[f"decode_{streams}_streams"] = median_rate(
            streams * NEW_TOKENS, lambda n=streams: run(n, 1, NEW_TOKENS), repeats
        )
    figures[f"prefill_{PREFILL_TOKENS}"] = median_rate(
        PREFILL_TOKENS, lambda: run(1, PREFILL_TOKENS, 1), repeats
    )
    return figures


def measure_transformers(path: str, engine: Engine, repeats: int) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, engine.info.dtype)
    device = torch.device(engine.info.device)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()

    def run(streams: int, prompt_tokens: int, new_tokens: int) -> None:
        ids = torch.full((streams, prompt_tokens), 7, device=device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    figures = {}
    for streams in (1, 16):
        figures[f"decode_{streams}_streams"] = median_rate(
            streams * NEW_TOKENS, lambda n=streams: run(n, 1, NEW_TOKENS), repeats
        )
    figures[f"prefill_{PREFILL_TOKENS}"] = median_rate(
        PREFILL_TOKENS, lambda: run(1, PREFILL_TOKENS, 1), repeats
    )
    return figures


if __name__ == "__main__":
    sys.exit(main())
