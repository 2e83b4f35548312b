"""`serve --auto`: the settings that the planner finds best for the traffic that is expected.

The search runs in a process of its own, `python -m moeserve.planner.auto`: it takes torch, which a
gateway has no use for. Standard input holds the request as JSON, standard output the answer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from moeserve.config import EngineConfig
from moeserve.core import ConfigError, MoeserveError

if TYPE_CHECKING:
    from moeserve.planner.plan_types import Traffic

#: of one search, simulated deployments and imports included
LONGEST_S = 120.0
CONCURRENCY, PROMPT_TOKENS, OUTPUT_TOKENS = 4, 512, 128
FLAGS = ("expect_concurrency", "expect_prompt_tokens", "expect_output_tokens")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """engine: as asked for. traffic: fields of Traffic."""

    engine: EngineConfig
    traffic: dict[str, int]


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """engine: the settings to serve with. words: lines on what was chosen and what to expect."""

    engine: EngineConfig
    words: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Settings found by planning")
    group.add_argument(
        "--auto",
        action="store_true",
        help="choose slots, kv, tokens of a step and threads by `moeserve plan` on this machine,"
        " which was calibrated; what is given stays",
    )
    for name, default, text in (
        (FLAGS[0], CONCURRENCY, "requests at once"),
        (FLAGS[1], PROMPT_TOKENS, "prompt tokens of a request"),
        (FLAGS[2], OUTPUT_TOKENS, "output tokens of a request"),
    ):
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=int,
            metavar="N",
            help=f"with --auto: {text} (default: {default})",
        )


def expected_traffic(args: argparse.Namespace) -> Traffic | None:
    """What to plan for; None without --auto. ConfigError for expectations without it, and for
    expert workers, which a plan does not know."""
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"{name}: {value} is below the minimum 1", field=name)
    if not args.auto:
        if given:
            name = next(iter(given))
            raise ConfigError(f"{name}: it is for --auto", field=name, hint="add --auto")
        return None
    from moeserve.planner.plan_types import Traffic, check_no_workers  # numpy: most need none

    check_no_workers(args.local_workers, args.workers)
    return Traffic(
        concurrency=given.get(FLAGS[0], CONCURRENCY),
        prompt_tokens=given.get(FLAGS[1], PROMPT_TOKENS),
        output_tokens=given.get(FLAGS[2], OUTPUT_TOKENS),
    )


def tune(
    engine: EngineConfig, traffic: Traffic, given: Iterable[str] = (), longest_s: float = LONGEST_S
) -> Tuned:
    """engine: as asked for. given: names of settings that are as by default and shall stay so; all
    that are not as by default stay in any case.

    Raises ConfigError with what the search says: no profile of this machine, a model that cannot be
    served, no settings that fit; and where it takes longer than it may.
    """
    command = [sys.executable, "-m", "moeserve.planner.auto", *given]
    asked = msgspec.json.encode(Asked(engine=engine, traffic=traffic.__dict__))
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, timeout=longest_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"auto: no settings found within {longest_s:.0f} s",
            field="auto",
            hint="plan for fewer --expect-concurrency, or choose settings by hand",
        ) from error
    if done.returncode:
        raise ConfigError(f"auto: {done.stderr.decode().strip()[-2000:]}", field="auto")
    return msgspec.json.decode(done.stdout, type=Tuned)


def main() -> int:
    from moeserve.planner.lookup import find_hardware, find_shape
    from moeserve.planner.plan_types import BY_ROUTING, PlanRequest, Traffic
    from moeserve.planner.search import given_of, search

    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    request = PlanRequest(engine=asked.engine, traffic=Traffic(**asked.traffic))
    given = given_of(asked.engine) | frozenset(sys.argv[1:])
    experts = asked.engine.experts
    if experts.predictor not in BY_ROUTING:  # what it foresees a plan does not know
        plain = replace(experts, predictor="none", predictor_file=None)
        request = replace(request, engine=replace(asked.engine, experts=plain))
    try:
        profile = find_hardware(None)
        found = search(request, profile, find_shape(request.engine), given)
    except MoeserveError as error:
        print(error, file=sys.stderr)
        return 2
    flags = " ".join(found.flags) or "nothing to be changed"
    rate, each = found.estimate.output_tokens_per_s, found.estimate.tpot_s
    traffic = request.traffic
    words = [
        f"{flags} ({found.tried} settings planned, {found.gain:.2f}x the first that fits)",
        f"expected with {traffic.concurrency} requests at once: {rate.mid:.1f} output tokens/s"
        f" ({rate.low:.1f} to {rate.high:.1f})"
        + ("" if each is None else f", {each.mid * 1e3:.0f} ms for each"),
    ]
    kept = replace(
        found.engine.experts,
        predictor=experts.predictor,
        predictor_file=experts.predictor_file,
    )
    tuned = Tuned(engine=replace(found.engine, experts=kept), words=words)
    sys.stdout.buffer.write(msgspec.json.encode(tuned))
    return 0


if __name__ == "__main__":
    sys.exit(main())
