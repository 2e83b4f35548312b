"""`moeserve bench cache`: how much of what is possible each policy reaches on recorded routing.

Every policy gets the same slots. Hit rates count experts wanted per step and layer; `closed` is
the part of the way from LRU to Belady's optimum in the same setting. Requests are split in two:
policies were tuned on one part and are reported on the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from moeserve.cli_options import check_output
from moeserve.core import ConfigError

if TYPE_CHECKING:
    from moeserve.bench.cache_suite import Job, Outcome

DEFAULT_STEPS = "single,streams:4,streams:16,chunk:64"
DEFAULT_TOKENS = 3000
DEFAULT_HISTORY = 6000
#: the predictor costs more than everything else together
DEFAULT_POLICIES = "lru,lfu,mrs,least_stale,score,belady"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from moeserve.bench.cache_suite import PARTS, POLICIES

    parser.add_argument(
        "--trace",
        action="append",
        type=Path,
        metavar="NPZ",
        help="recorded routing (`moeserve trace`); may be given several times",
    )
    parser.add_argument(
        "--slots", default="25%,50%", help="slots as shares of all experts (default: %(default)s)"
    )
    parser.add_argument(
        "--policies",
        default=DEFAULT_POLICIES,
        help=f"of {', '.join(POLICIES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        default=DEFAULT_STEPS,
        help="single (a token per step), streams:N (N requests at once), chunk:N (N tokens of one"
        " request); default: %(default)s",
    )
    parser.add_argument(
        "--part", default="report", choices=PARTS, help="requests to replay (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=DEFAULT_TOKENS,
        help="about so many per trace, in whole requests; 0: all (default: %(default)s)",
    )
    parser.add_argument(
        "--history",
        type=int,
        default=DEFAULT_HISTORY,
        help="tokens of the other requests that policies have seen before, their slots still empty"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--num-experts", type=int, help="experts per layer; default: by the highest id in the trace"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument(
        "--out", type=Path, metavar="STEM", help="write STEM.json, STEM.md and STEM.png, too"
    )


def run(args: argparse.Namespace) -> int:
    from moeserve.bench import cache_report

    jobs = _jobs(args)
    begun = time.monotonic()
    outcomes = _run_all(jobs, quiet=args.json)
    seconds = time.monotonic() - begun
    report = cache_report.as_json(jobs, outcomes, seconds)
    if not args.json:
        print(cache_report.markdown(report))
    if args.out is not None:
        cache_report.write(args.out, report)
    print(json.dumps(report))
    return 0


def _jobs(args: argparse.Namespace) -> list[Job]:
    from moeserve.bench.cache_suite import POLICIES, Job, make_steps

    if not args.trace:
        raise ConfigError(
            "trace: none given",
            field="trace",
            hint="--trace FILE.npz, as `moeserve trace` records it",
        )
    policies = tuple(_words(args.policies))
    unknown = [name for name in policies if name not in POLICIES]
    if unknown or not policies:
        raise ConfigError(
            f"policies: {args.policies!r}; there are {', '.join(POLICIES)}", field="policies"
        )
    kinds = _words(args.steps)
    for kind in kinds:
        make_steps((), kind)
    experts = 1 if args.num_experts is None else args.num_experts
    for field, value, least in (
        ("tokens", args.tokens, 0),
        ("history", args.history, 0),
        ("num_experts", experts, 1),
    ):
        if value < least:
            raise ConfigError(f"{field}: {value}; allowed: {least} or more", field=field)
    shares = tuple(_share(word) for word in _words(args.slots))
    for field, found in (("slots", shares), ("steps", kinds)):
        if not found:
            raise ConfigError(f"{field}: none given", field=field)
    if args.out is not None:
        check_output("out", args.out.with_suffix(".json"))
    num_tokens = args.tokens or None
    return [
        Job(path, kind, shares, policies, args.part, num_tokens, args.history, args.num_experts)
        for path in args.trace
        for kind in kinds
    ]


def _run_all(jobs: list[Job], quiet: bool) -> list[Outcome]:
    """One process per batch at a time and core: a replay is one thread of Python."""
    from moeserve.bench.cache_suite import run_jobs

    context = multiprocessing.get_context("spawn")
    batches = _batches(jobs, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(mp_context=context) as pool:
        futures = [pool.submit(run_jobs, batch) for batch in batches]
        outcomes: dict[Job, Outcome] = {}
        for batch, future in zip(batches, futures, strict=True):
            outcomes.update(zip(batch, future.result(), strict=True))
            if not quiet:
                for job in batch:
                    print(f"{job.path.stem}, {job.steps}: done", file=sys.stderr)
    return [outcomes[job] for job in jobs]


def _batches(jobs: list[Job], num_cores: int) -> list[list[Job]]:
    """Jobs that share a past together, since it is learnt once, but no fewer batches than cores."""
    by_past: dict[object, list[Job]] = {}
    for job in jobs:
        by_past.setdefault(job.past, []).append(job)
    parts = -(-num_cores // len(by_past))
    return [
        batch for of_past in by_past.values() for n in range(parts) if (batch := of_past[n::parts])
    ]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _share(word: str) -> float:
    number = word.removesuffix("%")
    try:
        share = float(number) / (100 if word.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(
            f"slots: {word!r}; allowed: shares of all experts above 0 up to 100%, as 25% or 0.25",
            field="slots",
        )
    return share
