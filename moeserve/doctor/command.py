"""The `doctor` subcommand."""

from __future__ import annotations

import argparse
import dataclasses
import sys

import msgspec
from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="measure no speed")


def run(args: argparse.Namespace) -> int:
    """Prints the report. 0: moeserve can serve, 1: it cannot."""
    try:
        # Imports torch and the native module, which may be what is broken.
        from moeserve.doctor.facts import gather
        from moeserve.doctor.problems import find_problems
        from moeserve.doctor.render import show
    except (ImportError, OSError) as error:
        return _cannot_even_look(error, args.json)
    facts = gather(args.quick)
    problems = find_problems(facts)
    fatal = any(problem.fatal for problem in problems)
    if args.json:
        report = {"can_serve": not fatal, **dataclasses.asdict(facts), "problems": problems}
        _print_json(report)
    else:
        show(Console(), facts, problems)
    return int(fatal)


def _cannot_even_look(error: Exception, as_json: bool) -> int:
    """A part that everything needs does not load."""
    what = f"cannot be imported: {error}"
    fix = "install moeserve again: pip install --force-reinstall moeserve"
    if as_json:
        _print_json({"can_serve": False, "problems": [{"fatal": True, "what": what, "fix": fix}]})
    else:
        print(f"moeserve {what}\n    {fix}", file=sys.stderr)
    return 1


def _print_json(report: dict[str, object]) -> None:
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
