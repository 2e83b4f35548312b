"""`moeserve bench serve`: recorded traffic against a running server, beside what was predicted.

Requests go out at the workload's times with prompts of its lengths and ask for answers of its
lengths. `moeserve plan --workload` with the same flags predicts the same figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moeserve.bench.serve_replay import DEFAULT_VOCAB_SIZE, replay
from moeserve.bench.serve_targets import HttpTarget, Target, ZmqTarget
from moeserve.core import ConfigError
from moeserve.environment import read_environment
from moeserve.planner.workload import Workload
from moeserve.planner.workload_flags import add_workload_flags, workload_of
from moeserve.planner.workload_outcome import Answer, Outcome, SloTargets, outcome_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload_flags(parser.add_argument_group("Traffic"))
    server = parser.add_argument_group("Server")
    where = server.add_mutually_exclusive_group()
    where.add_argument("--url", metavar="URL", help="over HTTP, as http://127.0.0.1:8000")
    where.add_argument(
        "--zmq",
        metavar="ENDPOINT",
        help="over ZeroMQ: ipc://PATH or tcp://HOST:PORT (default: MOESERVE_ENDPOINT, else your"
        " own server)",
    )
    server.add_argument("--model", help="name of the model, over HTTP (default: the first served)")
    server.add_argument(
        "--vocab-size",
        type=int,
        default=DEFAULT_VOCAB_SIZE,
        metavar="N",
        help="prompts are random token ids below it (default: %(default)s)",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="what `moeserve plan --workload --json` printed: shown beside what is measured",
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")


def run(args: argparse.Namespace) -> int:
    """0: all requests were answered; 1: some failed. Raises MoeserveError."""
    if args.workload is None:
        raise ConfigError("workload: none given", field="workload", hint="--workload FILE")
    if args.vocab_size < 2:
        raise ConfigError(f"vocab_size: {args.vocab_size}; allowed: 2 or more", field="vocab_size")
    workload = workload_of(args)
    slo = SloTargets(args.slo_ttft, args.slo_tpot)
    predicted = None if args.plan is None else read_plan(args.plan, workload, slo)
    answers = asyncio.run(_replay(args, workload))
    measured = Outcome.of(answers, slo).as_json()
    report = {
        "benchmark": "serve",
        "date": date.today().isoformat(),
        "workload": workload.name,
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "measured": measured,
        "predicted": predicted,
        "errors": sorted({answer.error for answer in answers if answer.error is not None})[:10],
    }
    if not args.json:
        show(Console(), workload, report)
    print(json.dumps(report))
    return int(bool(measured["failed"]))


async def _replay(args: argparse.Namespace, workload: Workload) -> list[Answer]:
    target: Target = ZmqTarget(args.zmq)
    if args.url is not None:
        target = HttpTarget(args.url, read_environment().api_key, args.model)
    async with target:
        await target.check()

        def report(done: int, of: int) -> None:
            if not args.json and (done == of or done % max(1, of // 20) == 0):
                print(f"{done} of {of} requests have ended", file=sys.stderr)

        return await replay(target, workload, args.vocab_size, report)


def read_plan(path: Path, workload: Workload, slo: SloTargets) -> dict[str, Any]:
    """The outcome in a plan's JSON. Raises ConfigError for a file that has none, or another
    workload's."""
    again = "write it by `moeserve plan MODEL --workload … --json` with the same flags"
    try:
        found = json.loads(path.read_text())["workload"]
        outcome: dict[str, Any] = found["mid"]
        of_here = workload.as_json()
        same = {name: found[name] for name in of_here} == of_here
        same = same and (outcome["requests"], found["slo"]) == (
            len(workload.requests),
            {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        )
    except OSError as error:
        raise ConfigError(
            f"plan: {path} cannot be read: {error.strerror}", field="plan", hint=again
        ) from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"plan: {path} holds no plan for a workload", field="plan", hint=again
        ) from error
    if not same:
        raise ConfigError(
            f"plan: {path} is for {outcome['requests']} requests of {found['name']} in"
            f" {found['span_s']:.4g} s, {found['prompt_tokens']} prompt and"
            f" {found['output_tokens']} output tokens, with the targets {found['slo']}, not for"
            " these",
            field="plan",
            hint=again,
        )
    return outcome


def show(console: Console, workload: Workload, report: dict[str, Any]) -> None:
    console.print(f"{workload.name}: {workload.in_words}, arriving over {workload.span_s:.0f} s")
    outcomes = [report["measured"]]
    if report["predicted"] is not None:
        outcomes.append(report["predicted"])
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "measured", "predicted")[: 1 + len(outcomes)]:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in outcome_rows(outcomes):
        table.add_row(*row)
    console.print(table)
    for error in report["errors"]:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
