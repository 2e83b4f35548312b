"""What `plan` and `bench serve` ask for recorded traffic."""

from __future__ import annotations

import argparse
from pathlib import Path

from moeserve.core import ConfigError
from moeserve.planner.workload import Workload
from moeserve.planner.workload_files import read_workload

#: requests that are planned for and replayed unless others are asked for
DEFAULT_REQUESTS = 200


def add_workload_flags(group: argparse._ArgumentGroup) -> None:
    """--workload, and what goes with it."""
    group.add_argument(
        "--workload",
        type=Path,
        metavar="FILE",
        help="arrivals and lengths: a trace of Azure, BurstGPT (.csv) or Mooncake (.jsonl)",
    )
    group.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help=f"of the workload, from its first (default: {DEFAULT_REQUESTS})",
    )
    group.add_argument(
        "--speed",
        type=float,
        metavar="X",
        help="arrivals come so many times as fast (default: 1)",
    )
    group.add_argument(
        "--clip",
        type=int,
        metavar="TOKENS",
        help="shorten requests to so many tokens, prompt and output together",
    )
    for name, text in (("ttft", "to the first token"), ("tpot", "for each further token")):
        group.add_argument(
            f"--slo-{name}", type=float, metavar="S", help=f"a good request takes at most S {text}"
        )


def workload_of(args: argparse.Namespace) -> Workload:
    """As the flags have it. Raises ConfigError."""
    count = DEFAULT_REQUESTS if args.requests is None else args.requests
    workload = read_workload(args.workload, count)
    if args.speed is not None:
        workload = workload.faster(args.speed)
    return workload if args.clip is None else workload.clipped(args.clip)


def workload_if_any(args: argparse.Namespace) -> Workload | None:
    """None without --workload. ConfigError for flags that are for it, or instead of it."""
    of_it = ("requests", "speed", "clip", "slo_ttft", "slo_tpot")
    instead = ("concurrency", "prompt_tokens", "output_tokens")
    for name in of_it if args.workload is None else instead:
        if getattr(args, name) is not None:
            what = "it is for --workload" if name in of_it else "contradicts --workload"
            raise ConfigError(
                f"{name}: {what}", field=name, hint="leave out one, or give the other"
            )
    return None if args.workload is None else workload_of(args)
