"""Decode over an emulated device: what scheduling, prefetching and caching bring.

    python scripts/bench_emulated.py ../shared/data/routing [--shares 25,50,75] [--tokens 2000]
        [--learn 6000] [--model NAME] [--profile rtx4090-pcie4] [--out benchmarks/results]

Theory. Static placement keeps the most popular experts on the device; what is wanted and not there
runs on the CPU, at its memory's bandwidth. While a layer lasts T us, the link can bring T / copy
experts more, so the gain over static is bounded by the link, by what can be foreseen, and by the
time with all experts on the device, which no placement goes below.

Real: MoE layers of the recorded model's number of layers and experts, router forced by the trace,
cache, policy, predictor, placement, prefetching, executor, copies into slots (a checker watches who
reads and writes them when) and every expert's result, from the slots' bytes; all strategies must
give the same bits. Emulated: time. Experts are small, and take the time that experts of the
recorded model's shape take by the profile, on the CPU, too; the rest of a layer takes the device
the time to read its weights. Not in the time: the bookkeeping itself, and that copies and the CPU
share the memory's bandwidth.

Strategies are those of HybriMoE's ablation (arXiv 2504.05897). Popularity, policy and predictor
have learnt from other requests than those that are timed. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path

from emulated.cases import SHAPES, Case, load_case
from emulated.report import Row, markdown, plot
from emulated.runs import DEPTH, Decoder, Outcome, learn

from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.experts.device_tier import find_profile
from moeserve.planner.ablation import STRATEGIES

POLICY, PREDICTOR = "score", "markov"


def main() -> int:
    args = arguments()
    by_name = {shape.name: shape for shape in SHAPES}
    profile = find_profile(args.profile)
    native = NativeRuntime(1)
    rows: list[Row] = []
    for shape in SHAPES if args.model is None else [by_name[args.model]]:
        case = load_case(shape, args.traces, profile, args.learn, args.tokens)
        learnt = learn(case, POLICY, PREDICTOR)
        decoder = Decoder(case, native)
        bits = set()
        for share in args.shares:
            num_slots = round(share * decoder.num_experts)
            static: Outcome | None = None
            for strategy in STRATEGIES:
                outcome = decoder.run(strategy, num_slots, learnt)
                static = static or outcome
                bits.add(outcome.checksum)
                rows.append(row_of(case, share, strategy.name, outcome, static))
                print(
                    shape.name,
                    f"{share:.0%}",
                    strategy.name,
                    f"{rows[-1]['gain']:.2f}x",
                    flush=True,
                )
        if len(bits) != 1:
            raise SystemExit(f"{shape.name}: strategies gave different bits: {sorted(bits)}")
    about = [
        f"`scripts/bench_emulated.py --tokens {args.tokens} --learn {args.learn}`, {date.today()}."
        f" Device, link and CPU by the profile"
        f" `{args.profile}`: {profile.device.name if profile.device else ''}, {profile.cpu.name}."
        f" Policy `{POLICY}`, predictor `{PREDICTOR}`, {DEPTH} layers ahead at most. One stream."
        " Time is emulated, results are computed: all strategies gave the same bits. The time of"
        " the bookkeeping itself is not in it.",
        *(f"- {source}" for source in profile.sources),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{date.today()}-emulated"
    stem.with_suffix(".md").write_text(markdown(rows, about))
    result = {"profile": args.profile, "policy": POLICY, "predictor": PREDICTOR, "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, stem.with_suffix(".png"))
    print(json.dumps(result))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("traces", type=Path, help="folder with the recorded routing")
    parser.add_argument("--shares", type=shares, default=(0.25, 0.5, 0.75), metavar="PERCENT,…")
    parser.add_argument("--tokens", type=int, default=2000, help="that are timed")
    parser.add_argument("--learn", type=int, default=6000, help="tokens that are learnt from")
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--model", choices=names, help="default: both")
    parser.add_argument("--profile", default="rtx4090-pcie4")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) / 100 for part in text.split(","))


def row_of(case: Case, share: float, strategy: str, outcome: Outcome, static: Outcome) -> Row:
    costs, top_k = case.costs, case.trace.ids.shape[2]
    layer_us = case.rest_us + costs.device_start_us + top_k * costs.device_us(1)
    return {
        "model": case.shape.name,
        "share": share,
        "strategy": strategy,
        "tokens_per_s": 1e6 / outcome.token_us,
        "gain": static.token_us / outcome.token_us,
        "resident_tokens_per_s": 1e6 / (layer_us * len(case.trace.layers)),
        "cpu_us": costs.cpu_us(1),
        "device_us": costs.device_us(1),
        "copy_us": costs.transfer_us(costs.expert_bytes),
        "rest_us": case.rest_us,
        "num_tokens": len(case.test),
        "num_learnt": len(case.learn),
        **asdict(outcome),
    }


if __name__ == "__main__":
    raise SystemExit(main())
