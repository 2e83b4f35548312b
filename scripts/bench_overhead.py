"""What cache and layer scheduler add to a step that misses nothing.

    python scripts/bench_overhead.py [PACKED ...] [--rounds 24] [--out benchmarks/results]

Theory. With a slot for every expert a tier has nothing to do: a step computes what the resident
engine computes, from slots instead of a mapping, so all that is longer is bookkeeping. Asked: under
3 % of a step. Two ways of having all that is wanted are measured:

- every expert has a slot and has come in: the tier is settled, and layers run as resident ones;
- one slot fewer than experts: everything is at work, in every layer (route, place, pin, predict,
  prefetch), though next to nothing is missed. The difference to the same without a predictor is
  what predicting costs end to end, asked: under 2 % of a step.

Measured: decode of one stream, greedy. The resident engine and one with tiers run in turns, in
blocks of STEPS steps at the same positions, after WARM steps; times are medians of all, and the
ratio is the median over the rounds of (median of a block : median of the block beside it), so that
other work on the machine falls on both. PACKED: directories written by `moeserve pack`; none: the
bundled model, packed as it is. Needs memory for a model twice.

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from moeserve.config import BUNDLED_MODEL, EngineConfig, ExpertConfig, KvConfig, ModelConfig
from moeserve.core import EngineRequest, ExpertKey, SamplingParams
from moeserve.cpu_backend.machine import cpu_model
from moeserve.engine.engine import Engine
from moeserve.experts.disk_supply import DiskSupply
from moeserve.models.pack import pack_model
from moeserve.predictors.residual_weights import PREDICTORS_FILE

WARM = 40
STEPS = 12


@dataclass(frozen=True)
class Case:
    """lacking: slots fewer than experts."""

    lacking: int
    policy: str
    predictor: str

    @property
    def name(self) -> str:
        state = "settled" if self.lacking == 0 else f"lacks {self.lacking}"
        return f"{state}, {self.policy}, {self.predictor}"


@dataclass(frozen=True)
class Result:
    """step_us, resident_us: medians. ratio: of the two, round by round. misses: while timed."""

    case: Case
    step_us: float
    resident_us: float
    ratio: float
    misses: int


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", metavar="PACKED")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="directory for the result, named by date")
    args = parser.parse_args()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(args.threads), "models": []}
    with tempfile.TemporaryDirectory(prefix="moeserve-bench-") as folder:
        models = args.models
        if not models:
            bundled = ModelConfig(model=str(BUNDLED_MODEL))
            models = [pack_model(bundled, Path(folder) / "tiny-moe").path]
        for model in models:
            report["models"].append(measure_model(model, args.rounds, args.threads))
    if args.out is not None:
        path = args.out / f"{date.today()}-overhead.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0


def measure_model(model: Path, rounds: int, threads: int) -> dict[str, Any]:
    predictors = ["gate_lookahead"]
    if (model / PREDICTORS_FILE).exists():
        predictors.append("gate_residual")
    cases = [Case(0, policy, p) for policy in ("lru", "score") for p in ("none", predictors[-1])]
    cases += [Case(1, "lru", "none"), Case(1, "score", "none")]
    cases += [Case(1, "score", predictor) for predictor in predictors]
    resident = start(model, threads)
    print(f"{model.name}: {resident.loaded.notes['experts']}", flush=True)
    results = []
    for case in cases:
        result = beside(resident, model, case, rounds, threads)
        results.append(result)
        print(
            f"{case.name:36s} {result.step_us:9.0f} us  resident {result.resident_us:9.0f} us"
            f"  {100 * (result.ratio - 1):+6.2f} %  {result.misses} misses",
            flush=True,
        )
    resident.close()
    without = next(r for r in results if r.case == Case(1, "score", "none"))
    added = {
        r.case.predictor: r.ratio - without.ratio
        for r in results
        if r.case.lacking and r.case.predictor != "none"
    }
    for name, share in added.items():
        print(f"{name}: {100 * share:+.2f} % of a resident step", flush=True)
    return {
        "model": model.name,
        "results": [asdict(result) for result in results],
        "predicting_share": added,
    }


def start(model: Path, threads: int, **experts: Any) -> Engine:
    engine = Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(model), context_tokens=1024),
            kv=KvConfig(num_blocks=64),
            experts=ExpertConfig(cpu_backend="native", num_threads=threads, **experts),
        )
    )
    engine.page_mover.wait()
    return engine


def beside(resident: Engine, model: Path, case: Case, rounds: int, threads: int) -> Result:
    """One engine with tiers, in turns with the resident one."""
    num_slots = resident.loaded.runtime.cache.numbers.total - case.lacking
    settings = {"host_slots": num_slots, "policy": case.policy, "predictor": case.predictor}
    tiered = start(model, threads, **settings)
    fill(tiered)
    engines = (resident, tiered)
    for engine in engines:
        begin(engine, WARM + rounds * STEPS)
        for _ in range(WARM):
            engine.step()
    misses = total_misses(tiered)
    each: tuple[list[list[float]], ...] = ([], [])
    for number in range(rounds):
        for place in (0, 1) if number % 2 else (1, 0):
            each[place].append([step_us(engines[place]) for _ in range(STEPS)])
    of_resident, of_tiered = (
        [statistics.median(block[1:]) for block in blocks]  # the first step finds caches cold
        for blocks in each
    )
    result = Result(
        case,
        statistics.median(of_tiered),
        statistics.median(of_resident),
        statistics.median(t / r for t, r in zip(of_tiered, of_resident, strict=True)),
        total_misses(tiered) - misses,
    )
    for engine in engines:
        while engine.has_work:
            engine.step()
        engine.check_integrity()
    tiered.close()
    return result


def fill(engine: Engine) -> None:
    """Reads as many experts as there are slots for."""
    runtime = engine.loaded.runtime
    cache, supply = runtime.cache, runtime.supply
    assert isinstance(supply, DiskSupply), "only tiers over the disk fill themselves"
    numbers = cache.numbers
    keys = [
        ExpertKey(layer, expert)
        for layer, size in zip(numbers.layers, numbers.sizes, strict=True)
        for expert in range(size)
    ]
    supply.begin_prefetch(cache.prefetch(keys[: cache.num_slots]))
    while sum(len(cache.residency(layer).ready) for layer in numbers.layers) < cache.num_slots:
        time.sleep(0.01)
        supply.collect()


def begin(engine: Engine, num_tokens: int) -> None:
    params = SamplingParams(max_tokens=num_tokens + 1, temperature=0, ignore_eos=True)
    engine.add(EngineRequest(request_id="timed", token_ids=[1, 2, 3], params=params))


def step_us(engine: Engine) -> float:
    started_s = time.perf_counter()
    engine.step()
    return (time.perf_counter() - started_s) * 1e6


def total_misses(engine: Engine) -> int:
    counts = engine.loaded.runtime.cache.counters.totals()
    return counts["misses"] + counts["late"]


def machine(threads: int) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
