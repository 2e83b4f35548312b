"""A model larger than its memory: decode over the disk tier, beside its bounds.

    python scripts/bench_tiers.py PACKED --trace ROUTING.npz [--shares 25,50,75] [--repeats 3]
        [--ahead 6] [--out benchmarks/results]

Theory. A step reads from disk every expert that it wants and that has no slot. Nothing else comes
near in time: an expert of 14 MB takes 14 ms from a disk of 1 GB/s and half a millisecond from
memory. So the time per token is at least

    bound = misses(Belady) * bytes per expert / disk bandwidth

where Belady's oracle knows the tokens to come. Reading hides behind computing at best, so where
computing takes longer, that is the bound ("with computing": the longer of the two, computing being
what the LRU case did not wait for the disk). What is measured beside it: `lru`, fetching on demand,
which is what everybody does; our policies; and prefetching on a prediction, which reads while
computing and may read in vain. Routing is forced from a recorded trace (experts/replay.py), because
random weights route as no model does; the tokens are taken from the end of the trace. A policy or
predictor that learns while serving is given what it would have seen of the HISTORY tokens before
those, without computing them; what LRU would hold after them is filled in by the tokens that
follow. Every case is a process of its own. WARM tokens fill the slots, then TOKENS are timed. Disk
bandwidth: of whole records read by the same threads, in every process, median.

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeserve.cache.numbering import ExpertNumbers
from moeserve.cache.policies.belady import BeladyPolicy
from moeserve.cache.replay import Contender, Rules, TierReplay, all_uses, replay, uses_of
from moeserve.cache.routing_trace import RoutingTrace, load_trace
from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig
from moeserve.core import EngineRequest, Routing, SamplingParams
from moeserve.cpu_backend.machine import cpu_model
from moeserve.engine.engine import Engine
from moeserve.experts.disk_supply import DiskSupply
from moeserve.experts.replay import RoutingReplay, force_routing
from moeserve.experts.schedule.intra_layer import FetchOrder
from moeserve.models.transformer import MoeFfn

HISTORY = 8000
WARM = 48
TOKENS = 96
#: (name, policy, predictor, depth); with `--ahead`, markov once for each of these depths
CASES = (("on-demand lru", "lru", "none", 1), ("score", "score", "none", 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--shares", default="25,50,75", help="percent of experts with a slot")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ahead", default="6", help="layers that markov looks ahead")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--first-token", type=int, help="of the trace; default: near its end")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    trace = load_trace(args.trace)
    first = args.first_token or len(trace.ids) - WARM - TOKENS - 1
    if args.case is not None:
        print(json.dumps(run_case(args.model, trace, first, args.threads, json.loads(args.case))))
        return 0
    shares = [int(share) / 100 for share in args.shares.split(",")]
    depths = [int(depth) for depth in args.ahead.split(",")]
    cases = [*CASES, *((f"score, markov {n} ahead", "score", "markov", n) for n in depths)]
    runs: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for _ in range(args.repeats):  # by turns, so that a drifting machine is unfair to none
        for share in shares:
            for case in cases:
                result = run_alone(share, case)
                runs.setdefault((share, case[0]), []).append(result)
                print(f"{share:.0%} {case[0]}: {result['tokens_per_s']:.2f} tokens/s", flush=True)
    report = summarise(trace, first, shares, runs)
    if args.out is not None:
        path = args.out / f"{date.today()}-tiers.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0


def run_alone(share: float, case: Sequence[Any]) -> dict[str, Any]:
    settings = json.dumps({"share": share, "case": case})
    ended = subprocess.run(
        [sys.executable, *sys.argv, "--case", settings],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def run_case(
    model: Path, trace: RoutingTrace, first: int, threads: int | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Decodes one stream; counts and times of the last TOKENS."""
    _, policy, predictor, depth = settings["case"]
    config = json.loads((model / "config.json").read_text())
    num_experts = config["num_hidden_layers"] * trace.num_experts
    engine = Engine.from_config(
        EngineConfig(
            model=ModelConfig(model=str(model), context_tokens=1024),
            kv=KvConfig(num_blocks=64),
            experts=ExpertConfig(
                cpu_backend="native",
                num_threads=threads,
                host_slots=round(settings["share"] * num_experts),
                policy=policy,
                predictor=predictor,
                prefetch_depth=None if predictor == "none" else depth,
            ),
        )
    )
    supply = engine.loaded.runtime.supply
    assert isinstance(supply, DiskSupply)
    layers = [x.ffn.routed for x in engine.loaded.model.layers if isinstance(x.ffn, MoeFfn)]
    force_routing(layers, RoutingReplay(trace, [first]), trace)
    remember(engine, trace, range(max(0, first - HISTORY), first))
    params = SamplingParams(max_tokens=WARM + TOKENS, temperature=0, ignore_eos=True)
    engine.add(EngineRequest(request_id="r", token_ids=[1], params=params))
    for _ in range(WARM):
        engine.step()
    before, stall_s = supply.cache.counters.totals(), supply.transfers.stats.stall_s
    bytes_before = supply.transfers.stats.demand_bytes + supply.transfers.stats.prefetch_bytes
    begun = time.perf_counter()
    for _ in range(TOKENS):
        engine.step()
    took_s = time.perf_counter() - begun
    after, stats = supply.cache.counters.totals(), supply.transfers.stats
    result = {
        "tokens_per_s": TOKENS / took_s,
        "stall_share": (stats.stall_s - stall_s) / took_s,
        "read_bytes": stats.demand_bytes + stats.prefetch_bytes - bytes_before,
        "expert_bytes": supply.slots.slot_bytes,
        "num_slots": supply.cache.num_slots,
        "disk_bytes_per_s": disk_rate(engine, supply.slots.slot_bytes),
        **{name: after[name] - before[name] for name in after},
    }
    engine.close()
    return result


def remember(engine: Engine, trace: RoutingTrace, tokens: range) -> None:
    """Tells policy and predictor of tokens that are not computed."""
    policy, predictor = engine.loaded.runtime.cache.policy, engine.loaded.runtime.predictor
    no_hidden_state = torch.zeros(1, 0)  # none was recorded: predictors of gates have no history
    weights = torch.ones(1, trace.ids.shape[2])
    for token in tokens:
        ids = torch.from_numpy(trace.ids[token].astype(np.int64))  # [L, K]
        for rank, use in enumerate(uses_of(trace, np.array([token]))):
            policy.observed(use)
            if predictor.name == "markov":
                predictor.predict(
                    use.layer, no_hidden_state, Routing(ids[rank : rank + 1], weights)
                )


def disk_rate(engine: Engine, expert_bytes: int) -> float:
    """As the engine measured it at its start."""
    intra = engine.loaded.runtime.intra
    assert isinstance(intra, FetchOrder)
    costs = next(iter(intra.costs.values()))
    return expert_bytes / costs.disk_us(expert_bytes) * 1e6


def belady_misses(trace: RoutingTrace, first: int, share: float) -> int:
    """Of the timed tokens, with the slots shared by all layers as ours are, bypass allowed."""
    steps = [np.array([token]) for token in range(first, first + WARM + TOKENS)]
    numbers = ExpertNumbers(trace.experts_per_layer)
    tier = TierReplay(numbers, Rules(share, bypass=True, keep_used=False))
    oracle = BeladyPolicy(numbers, all_uses(trace, steps))
    asked = replay(trace, steps, [Contender("belady", oracle, [tier])])
    return int((asked - np.array(tier.hits))[WARM:].sum())


def summarise(
    trace: RoutingTrace,
    first: int,
    shares: Sequence[float],
    runs: dict[tuple[float, str], list[dict[str, Any]]],
) -> dict[str, Any]:
    every = [result for results in runs.values() for result in results]
    disk = statistics.median(result["disk_bytes_per_s"] for result in every)
    table: list[dict[str, Any]] = []
    for share in shares:
        misses = belady_misses(trace, first, share)
        disk_s = misses * every[0]["expert_bytes"] / disk
        bound = TOKENS / disk_s
        computing_s = statistics.median(
            (1 - r["stall_share"]) * TOKENS / r["tokens_per_s"] for r in runs[share, CASES[0][0]]
        )
        with_computing = TOKENS / max(disk_s, computing_s)
        lru = statistics.median(r["tokens_per_s"] for r in runs[share, CASES[0][0]])
        for name, results in ((name, runs[of, name]) for of, name in runs if of == share):
            speed = statistics.median(r["tokens_per_s"] for r in results)
            median = {
                key: statistics.median(r[key] for r in results)
                for key in ("stall_share", "read_bytes", "hits", "late", "misses")
            }
            table.append(
                {
                    "share": share,
                    "case": name,
                    "tokens_per_s": speed,
                    "spread": [
                        min(r["tokens_per_s"] for r in results),
                        max(r["tokens_per_s"] for r in results),
                    ],
                    "of_lru": speed / lru,
                    "bound_tokens_per_s": bound,
                    "of_bound": speed / bound,
                    "bound_with_computing_tokens_per_s": with_computing,
                    "of_bound_with_computing": speed / with_computing,
                    "belady_misses": misses,
                    **median,
                }
            )
    return {
        "benchmark": "tiers",
        "date": str(date.today()),
        "machine": cpu_model(),
        "disk_bytes_per_s": disk,
        "expert_bytes": every[0]["expert_bytes"],
        "trace": trace.name,
        "first_token": first,
        "warm_tokens": WARM,
        "tokens": TOKENS,
        "table": table,
    }


if __name__ == "__main__":
    sys.exit(main())
