"""Decode over an emulated device: what scheduling, prefetching and caching bring.

    python scripts/bench_emulated.py ../shared/data/routing [--shares 25,50,75] [--tokens 5000]
        [--learn 40000] [--model NAME] [--profile rtx4090-pcie4] [--out benchmarks/results]
        [--join JSON …]

Theory. Static placement keeps the most popular experts on the device; what is wanted and not there
runs on the CPU, at its memory's bandwidth. While a layer lasts T us, the link can bring T / copy
experts more, so the gain over static is bounded by the link, by what can be foreseen, and by the
time with all experts on the device, which no placement goes below.

Real: MoE layers of the recorded model's number of layers and experts, router forced by the trace,
cache, policy, predictor, placement, prefetching, executor, copies into slots (a checker watches who
reads and writes them when) and every expert's result, from the slots' bytes; all strategies must
give the same bits. Emulated: time. Experts are small, and take the time that experts of the
recorded model's shape take by the profile, on the CPU, too. Shared experts and the rest of a layer
take the device the time to read their weights; shared ones run beside the CPU's, the rest cannot.
Not in the time: the bookkeeping itself, that copies and the CPU share the memory's bandwidth, and
what is in no layer of experts, which is added as one more column.

Strategies are those of HybriMoE's ablation (arXiv 2504.05897). Popularity is counted over all
other requests than those that are timed; policy and predictor have learnt from a part of them. Last
line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from emulated.cases import SHAPES, SHARES, Case, load_case
from emulated.report import Row, markdown, plot
from emulated.runs import DEPTH, Decoder, Outcome, Run, learn

from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.experts.device_tier import find_profile
from moeserve.planner.ablation import STRATEGIES

POLICY, PREDICTOR = "score", "markov"
#: tokens between two results
BLOCK = 100


def main() -> int:
    args = arguments()
    if args.join:
        parts = [json.loads(path.read_text()) for path in args.join]
        rows = [row for part in parts for row in part["rows"]]
        result = write(args, rows, [command for part in parts for command in part["commands"]])
    else:
        result = run(args)
    print(json.dumps(result))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All strategies and shares side by side, so that what is written after every block compares
    them on the same tokens: all of it takes an hour."""
    by_name = {shape.name: shape for shape in SHAPES}
    profile = find_profile(args.profile)
    native = NativeRuntime(1)
    before: list[Row] = []  # of other models
    result: dict[str, Any] = {}
    for shape in SHAPES if args.model is None else [by_name[args.model]]:
        case = load_case(shape, args.traces, profile, args.learn, args.tokens)
        learnt = learn(case, POLICY, PREDICTOR)
        decoder = Decoder(case, native)
        runs = {
            share: [
                decoder.begin(strategy, round(share * decoder.num_experts), learnt)
                for strategy in STRATEGIES
            ]
            for share in args.shares
        }
        for done in range(0, len(case.test), BLOCK):
            for of_share in runs.values():
                for one in of_share:
                    one.decode(BLOCK)
            rows = before + rows_of(case, runs)
            result = write(args, rows, [command_of(args)])
            gains = [f"{row['gain']:.3f}" for row in rows if row["strategy"] == "all"]
            print(shape.name, done + BLOCK, "tokens:", *gains, flush=True)
        before = result["rows"]
    return result


def rows_of(case: Case, runs: Mapping[float, Sequence[Run]]) -> list[Row]:
    rows = []
    for share, of_share in runs.items():
        outcomes = [one.outcome() for one in of_share]
        rows += [
            row_of(case, share, strategy.name, outcome, outcomes[0])
            for strategy, outcome in zip(STRATEGIES, outcomes, strict=True)
        ]
    bits = {row["checksum"] for row in rows}
    if len(bits) != 1:
        raise SystemExit(f"{case.shape.name}: strategies gave different bits: {sorted(bits)}")
    return rows


def command_of(args: argparse.Namespace) -> str:
    model = "" if args.model is None else f" --model {args.model}"
    return f"scripts/bench_emulated.py{model} --tokens {args.tokens} --learn {args.learn}"


def write(args: argparse.Namespace, rows: list[Row], commands: list[str]) -> dict[str, Any]:
    profile = find_profile(args.profile)
    about = [
        f"{' and '.join(f'`{command}`' for command in commands)}, {date.today()}."
        f" Device, link and CPU by the profile"
        f" `{args.profile}`: {profile.device.name if profile.device else ''}, {profile.cpu.name}."
        f" Policy `{POLICY}`, predictor `{PREDICTOR}`, {DEPTH} layers ahead at most. One stream."
        " Time is emulated, results are computed: all strategies gave the same bits. The time of"
        " the bookkeeping itself is not in it. No placement is faster than all experts on the"
        " device, so a gain of 1.7 is in reach only where `all resident` is above it.",
        "",
        *(f"- {source}" for source in profile.sources),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{date.today()}-emulated"
    stem.with_suffix(".md").write_text(markdown(rows, about))
    result = {
        "profile": args.profile,
        "policy": POLICY,
        "predictor": PREDICTOR,
        "commands": commands,
        "rows": rows,
    }
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, stem.with_suffix(".png"))
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("traces", type=Path, help="folder with the recorded routing")
    parser.add_argument("--shares", type=shares, default=SHARES, metavar="PERCENT,…")
    parser.add_argument("--tokens", type=int, default=5000, help="that are timed")
    parser.add_argument("--learn", type=int, default=40000, help="tokens that are learnt from")
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--model", choices=names, help="default: both")
    parser.add_argument(
        "--join",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="run nothing: one report of results of runs with --model",
    )
    parser.add_argument("--profile", default="rtx4090-pcie4")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) / 100 for part in text.split(","))


def row_of(case: Case, share: float, strategy: str, outcome: Outcome, static: Outcome) -> Row:
    costs, top_k = case.costs, case.trace.ids.shape[2]
    layer_us = case.rest_us + costs.device_begins_us + top_k * costs.device_us(1)
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
        "shared_us": costs.shared_us,
        "outside_us": case.outside_us,
        "static_hits": list(case.static_hits),
        "whole_gain": (static.token_us + case.outside_us) / (outcome.token_us + case.outside_us),
        "num_learnt": len(case.learn),
        "num_counted": len(case.others),
        **asdict(outcome),
    }


if __name__ == "__main__":
    raise SystemExit(main())
