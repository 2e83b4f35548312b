"""What `moeserve plan` predicts beside what the engine then does, over 36 configurations.

    python scripts/bench_plan.py [--profile FILE | --calibrate] [--rounds 4] [--configs 36]
        [--out benchmarks/results] [--state DIR] [--again]

Three shapes of models (plan_bench/cases.py) in three formats, each with all, three quarters, half
and a quarter of its experts in memory, the others on disk; 1, 4 or 16 clients with prompts of 64,
256 or 768 tokens, so that every pair of these comes up with every share. Weights are random, packed
by `planner/random_model.py`; one model is written at a time (at most 1.3 GB) and removed.

Predicted: by stage 2 of the plan from the profile that `moeserve calibrate` wrote, which has seen
experts of another size (2048 x 768) and another small model, none of these. Hit rates follow from
routing that is recorded of other prompts than the timed ones, as `moeserve trace` would.
Measured: the engine in a process of its own, clients that send their next request when the last has
ended; once to warm up, then played until 4 s have passed; medians. The cases of a model take turns,
--rounds times, and medians of the rounds count: of many, since a machine that others share is a
third slower for ten seconds at times.

It also computes a third faster or slower some minutes later (docs/log.md). With --calibrate it is
calibrated, in the format of the model, right before the first round of a model's four cases, after
every second one and after the last, for a minute each time, and the prediction is the mean of those
from all: what is tested is the planner and not how long the machine stays as it was.

The disk of a virtual machine may read half as much again a minute later, and no plan can know. So
the disk is looked at again right before and right after a case that reads from it (records of
256 KiB, 1 and 16 MiB, as `calibrate` does), and the prediction is made from that. What it would
have been with the disk as it was calibrated is reported beside it.

Every case is kept in --state as soon as it is measured, and a run goes on where the last one
stopped. What was measured under another profile or with another engine (its sources, or how it is
measured) is measured anew, and so is everything with --again; routing is recorded anew with it.
Predictions are made anew in every run. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from moeserve.environment import tune_native_libraries

tune_native_libraries()

from plan_bench.calibrations import Calibrations  # noqa: E402
from plan_bench.cases import OUTPUT_TOKENS, Case, all_cases, write_config  # noqa: E402
from plan_bench.measure import disk_points, measure, middle_of, record_routing  # noqa: E402
from plan_bench.predict import mean_of, on_disk, predict  # noqa: E402
from plan_bench.report import PARTS, accuracy, draw, markdown, summarise  # noqa: E402

from moeserve.cpu_backend.machine import cpu_model  # noqa: E402
from moeserve.experts.schedule.profile import Profile  # noqa: E402
from moeserve.experts.schedule.profile_file import encode_profile  # noqa: E402
from moeserve.planner.lookup import find_hardware  # noqa: E402
from moeserve.planner.random_model import write_random_packed  # noqa: E402

ROOT = Path(__file__).parent.parent
#: sources of which decide what is measured
ENGINE_ROOMS = (
    "moeserve/config", "moeserve/engine", "moeserve/models",
    "experts", "cache", "cpu_backend", "predictors",
)  # fmt: skip
ENGINE_FILES = (
    "moeserve/core.py", "moeserve/timeline.py",
    "moeserve/planner/disk_figures.py", "moeserve/planner/process_memory.py",
    "moeserve/planner/random_model.py", "moeserve/planner/simulate/system.py",
    "moeserve/predictor_tools/trace.py",
    "scripts/plan_bench/cases.py", "scripts/plan_bench/measure.py",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", help="default: this machine's own")
    parser.add_argument(
        "--calibrate", action="store_true", help="between rounds of a model's cases and around them"
    )
    parser.add_argument("--rounds", type=int, default=4, help="how often each case is measured")
    parser.add_argument("--foreign", action="store_true", help="a profile that is not of here")
    parser.add_argument("--configs", type=int, help="only so many, spread over the models")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--state", type=Path, default=Path("build/bench_plan"))
    parser.add_argument("--again", action="store_true", help="measure what was measured already")
    parser.add_argument("--out", type=Path, help="folder for <date>-plan.json, .md and .png")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--traces", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        return run_child(args)
    if args.out is not None:  # before half an hour of measuring
        args.out.mkdir(parents=True, exist_ok=True)
    if args.calibrate and (args.profile is not None or args.foreign):
        raise SystemExit("--calibrate: contradicts --profile and --foreign; give one")
    if args.rounds < 1:
        raise SystemExit(f"--rounds {args.rounds}: at least 1")
    args.state.mkdir(parents=True, exist_ok=True)
    known = None if args.calibrate else find_hardware(args.profile, args.foreign)
    rows = list(all_rows(args, known, chosen(args.configs, args.only)))
    if not rows:
        raise SystemExit(f"--only {args.only}: no case has that in its name")
    record = {
        "benchmark": "plan",
        "date": date.today().isoformat(),
        "command": "python scripts/bench_plan.py"
        + (" --calibrate" if args.calibrate else "")
        + f" --rounds {args.rounds}",
        "machine": {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0))},
        "profile_date": known.date if known else "the same hour",
        "output_tokens": OUTPUT_TOKENS,
        "summary": summarise(rows),
        "rows": rows,
    }
    if args.out is not None:
        stem = args.out / f"{record['date']}-plan"
        stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        stem.with_suffix(".md").write_text(markdown(record))
        draw(stem.with_suffix(".png"), record)
    else:
        print(markdown(record))
    print(json.dumps({key: record[key] for key in ("benchmark", "date", "machine", "summary")}))
    return 0


def chosen(count: int | None, name: str) -> list[Case]:
    cases = [case for case in all_cases() if name in case.name]
    if count is None or count >= len(cases):
        return cases
    return [cases[rank * len(cases) // count] for rank in range(count)]


def all_rows(
    args: argparse.Namespace, known: Profile | None, cases: list[Case]
) -> Iterator[dict[str, Any]]:
    """known: the machine's profile, of all cases; None: it is calibrated around each model's."""
    calibrations = Calibrations(args.state, args.again, args.rounds)
    for name in dict.fromkeys(case.model for case in cases):
        own = [case for case in cases if case.model == name]
        model = args.state / name
        shutil.rmtree(model, ignore_errors=True)  # of a run that was stopped
        write_random_packed(write_config(own[0].shape, args.state), model, own[0].quantize)
        traces = {n: trace_of(args.state, name, n, engine_digest()) for n in prompts_of(own)}
        if lacking := to_record(traces, args.again):
            child(model, own[0], lacking)
        profiles = [known or calibrations.first(name, partial(nothing_lacks, args, own))]
        of = stamp(profiles[0])
        finds = {case: [] if args.again else measured(args.state, case, of) for case in own}
        for number in range(args.rounds):
            measure_round(args, model, finds, number, of)
            if known is None and calibrations.is_due(number + 1):
                profiles.append(calibrations.after(name, number + 1))
        for case, rounds in finds.items():
            found = middle_of(rounds)
            trace = traces[case.context_tokens]
            here = [on_disk(profile, found["disk"]) for profile in profiles]
            predicted = mean_of([predict(model, trace, case, each) for each in here])
            before = predicted
            if here != profiles:
                before = mean_of([predict(model, trace, case, each) for each in profiles])
            row = {
                **case.as_json(),
                "measured": found,
                "predicted": predicted,
                "with_calibrated_disk": {part: before[part] for part in (*PARTS, "low", "high")},
            }
            show(row)
            yield row
        shutil.rmtree(model)


def nothing_lacks(args: argparse.Namespace, cases: list[Case], profile: Profile) -> bool:
    """Whether every round of the cases is kept under that profile."""
    of = stamp(profile)
    return all(len(measured(args.state, case, of)) >= args.rounds for case in cases)


def measure_round(
    args: argparse.Namespace,
    model: Path,
    finds: dict[Case, list[dict[str, Any]]],
    number: int,
    of: dict[str, str],
) -> None:
    """What lacks of a round of the cases of a model, added to what is known of each, and kept."""
    for case, rounds in finds.items():
        if number < len(rounds):
            continue
        disk = disk_points(model, case)
        found = child(model, case)
        found["disk"] = disk + disk_points(model, case)
        rounds.append(found)
        kept(args.state, case).write_text(json.dumps({**of, "measured": rounds}))


def stamp(profile: Profile) -> dict[str, str]:
    """What a kept measurement belongs to."""
    return {"profile": digest(profile), "engine": engine_digest()}


def kept(state: Path, case: Case) -> Path:
    return state / f"{case.name}.json"


def prompts_of(cases: list[Case]) -> list[int]:
    """Tokens of their prompts, each once."""
    return sorted({case.context_tokens for case in cases})


def trace_of(state: Path, model: str, prompt_tokens: int, engine: str) -> Path:
    """Routing of a model on prompts of so many tokens, as this engine computes it."""
    return state / f"{model}-{prompt_tokens}-{engine[:12]}.npz"


def to_record(traces: dict[int, Path], again: bool) -> dict[int, Path]:
    """Of traces by the tokens of prompts, those that are not there; again: all."""
    return {n: path for n, path in traces.items() if again or not path.exists()}


def measured(state: Path, case: Case, of: dict[str, str]) -> list[dict[str, Any]]:
    """What is kept of a case, round by round, under this profile and with this engine."""
    path = kept(state, case)
    found = json.loads(path.read_text()) if path.exists() else {}
    return list(found["measured"]) if {key: found.get(key) for key in of} == of else []


def engine_digest() -> str:
    """Of the sources of what is measured, and of how it is measured."""
    files = {path for room in ENGINE_ROOMS for path in (ROOT / room).rglob("*") if is_source(path)}
    files |= {ROOT / name for name in ENGINE_FILES}
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(path.read_bytes())
    return found.hexdigest()


def is_source(path: Path) -> bool:
    return path.suffix in (".py", ".cpp", ".h")


def digest(profile: Profile) -> str:
    return hashlib.sha256(encode_profile(profile)).hexdigest()


def child(model: Path, case: Case, traces: dict[int, Path] | None = None) -> dict[str, Any]:
    """A process for one case, or, with files by the tokens of prompts, for recording the model's
    routing."""
    command = [sys.executable, __file__, "--state", str(model.parent)]
    command += ["--case", json.dumps(case.as_json())]
    if traces is not None:
        command += ["--traces", json.dumps({n: str(path) for n, path in traces.items()})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_child(args: argparse.Namespace) -> int:
    fields = json.loads(args.case)
    fields.pop("name")
    case = Case(**fields)
    model = args.state / case.model
    if args.traces is not None:
        outs = {int(n): Path(path) for n, path in json.loads(args.traces).items()}
        record_routing(model, case.shape, outs)
        print("{}")
    else:
        print(json.dumps(measure(model, case)))
    return 0


def show(row: dict[str, Any]) -> None:
    measured, predicted = row["measured"], row["predicted"]
    parts = [
        f"{part} {measured[part]:.4g} / {predicted[part]:.4g}"
        f" ({accuracy(predicted[part], measured[part]):.0%})"
        for part in ("tokens_per_s", "ttft_s", "tpot_s", "rss_bytes")
    ]
    hits = f"hits {measured['hit_rate']:.2f} / {predicted['hit_rate']:.2f}"
    print(f"{row['name']:32s} {', '.join(parts)}, {hits}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
