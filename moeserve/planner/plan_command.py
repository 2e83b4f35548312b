"""The `plan` subcommand."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from moeserve.cli_options import ENGINE_SETTINGS, add_flags, engine_config
from moeserve.core import ConfigError
from moeserve.experts.schedule.profile import Profile
from moeserve.planner.plan_types import (
    Deployment,
    Estimate,
    PlanRequest,
    Traffic,
    check_no_workers,
    check_predictor,
)
from moeserve.planner.workload import Workload, add_workload_flags, workload_if_any
from moeserve.planner.workload_outcome import SloTargets, outcome_rows

if TYPE_CHECKING:
    from moeserve.planner.simulate.traffic import TrafficEstimate

PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128
Stage = Callable[[Deployment], Estimate]
#: settings of `serve` that a plan depends on; of the others it knows nothing
PLAN_SETTINGS = frozenset(
    (
        *("revision", "offline", "dtype", "device", "context_tokens"),
        *("quantize", "quantize_group", "quantize_zero_points", "quantize_head"),
        "quantize_activations",
        *("block_tokens", "kv_bytes", "num_blocks", "prefix_reuse"),
        *("max_batch_tokens", "max_running", "max_waiting", "admission", "history_requests"),
        "overtaking",
        *("host_memory_bytes", "host_slots", "min_host_slots", "policy"),
        *("device_memory_bytes", "device_slots", "num_threads"),
        *("predictor", "prefetch_depth", "disk_threads"),
    )
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="directory, hub id, or a config.json by itself (default: the bundled model)",
    )
    plan = parser.add_argument_group("Plan")
    plan.add_argument(
        "--hardware",
        metavar="PROFILE",
        help="a profile that comes with the package, or a file of `moeserve calibrate` (default:"
        " this machine's own)",
    )
    plan.add_argument(
        "--foreign",
        action="store_true",
        help="the profile was measured on another machine, and that one is meant",
    )
    plan.add_argument(
        "--concurrency", type=int, default=1, metavar="N", help="requests at once (default: 1)"
    )
    plan.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="TOKENS",
        help=f"of each request (default: {PROMPT_TOKENS}, or what --context leaves)",
    )
    plan.add_argument(
        "--output-tokens",
        type=int,
        metavar="TOKENS",
        help=f"of each request (default: {OUTPUT_TOKENS})",
    )
    plan.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="experts in the fast tier: on the device where there is one, else in memory",
    )
    plan.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="routing that `moeserve trace` has recorded, for hit rates",
    )
    plan.add_argument(
        "--bound-only",
        action="store_true",
        help="stage 1 alone: what nothing can beat; under two seconds",
    )
    plan.add_argument(
        "--no-advice", action="store_true", help="do not plan again with other settings"
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw throughput over requests and fast tier"
    )
    add_workload_flags(parser.add_argument_group("Recorded traffic, instead of equal requests"))
    add_flags(parser, *ENGINE_SETTINGS, only=PLAN_SETTINGS)
    parser.add_argument(
        "--context", type=int, dest="context_tokens", metavar="TOKENS", help=argparse.SUPPRESS
    )
    # Of `serve`: refused by name.
    parser.add_argument("--local-workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.set_defaults(device=None)


def run(args: argparse.Namespace) -> int:
    """Plans and prints. 0: it fits; 2: it does not, and the numbers were printed.

    Raises ConfigError and ModelError for what cannot be planned.
    """
    from moeserve.planner.deployment import DoesNotFit, find_hardware, find_shape, plan_on
    from moeserve.planner.plan_plot import check_plot, draw
    from moeserve.planner.plan_report import Plan, as_json, memory_json, show_memory, show_plan

    if args.plot is not None:
        check_plot(args.plot)
    check_no_workers(args.local_workers, args.worker)
    workload = workload_if_any(args)
    slo = SloTargets(args.slo_ttft, args.slo_tpot)
    profile = find_hardware(args.hardware, args.foreign)
    request = request_of(args, profile)
    if workload is not None:
        request = replace(request, traffic=mean_traffic(workload, request.traffic.concurrency))
    stages, compare = stages_of(args.bound_only)
    try:
        deployment = plan_on(request, profile, find_shape(request.engine))
    except DoesNotFit as error:
        if args.json:
            nearest = None if error.nearest is None else error.nearest.flags
            print(json.dumps({"memory": memory_json(error.plan), "nearest": nearest}, indent=2))
        else:
            show_memory(Console(stderr=True), error.plan)
        raise
    from moeserve.planner.advice import advise
    from moeserve.planner.bound import Bound

    plan = Plan(
        deployment=deployment,
        estimates=[stage(deployment) for stage in stages],
        saturation=Bound(deployment).saturation(),
        advice=[] if args.no_advice else advise(deployment, compare),
        notes=notes_of(deployment),
    )
    if args.plot is not None:
        draw(args.plot, deployment, list(dict.fromkeys([stages[0], compare])))
    document = as_json(plan) if args.json else {}
    if not args.json:
        show_plan(Console(), plan)
    if workload is not None:
        from moeserve.planner.simulate.traffic import simulate_traffic

        found = simulate_traffic(deployment, workload, slo)
        targets = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
        document["workload"] = {"name": workload.name, "slo": targets, **found.as_json()}
        if not args.json:
            show_traffic(Console(), workload, found)
    if args.json:
        json.dump(document, sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 0


def mean_traffic(workload: Workload, concurrency: int) -> Traffic:
    """Equal requests of a workload's mean lengths: what memory and bound are planned for."""
    count = len(workload.requests)
    return Traffic(
        concurrency=concurrency,
        prompt_tokens=max(1, sum(r.num_prompt for r in workload.requests) // count),
        output_tokens=max(1, sum(r.num_output for r in workload.requests) // count),
    )


def show_traffic(console: Console, workload: Workload, found: TrafficEstimate) -> None:
    """The likeliest outcome, and those of an engine as slow and as fast as it may be."""
    console.print(
        f"\n[bold]{workload.name}[/bold]: {len(workload.requests)} requests in"
        f" {workload.span_s:.0f} s, aimed at {found.confidence:.0%} of cases in the range;"
        f" {found.basis}",
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "predicted", "at the slowest", "at the fastest"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in outcome_rows([o.as_json() for o in (found.mid, found.low, found.high)]):
        table.add_row(*row)
    console.print(table)


def stages_of(bound_only: bool) -> tuple[list[Stage], Stage]:
    """The bound and our engine simulated; and what compares many deployments in short time."""
    from moeserve.planner.bound import bound

    if bound_only:
        return [bound], bound
    from moeserve.planner.simulate.system import simulate, simulate_quickly

    return [bound, simulate], simulate_quickly


def request_of(args: argparse.Namespace, profile: Profile) -> PlanRequest:
    """From flags: the device is that of the profile unless another was asked for."""
    on_device = profile.device is not None if args.device is None else args.device != "cpu"
    if args.slots is not None:
        field = "device_slots" if on_device else "host_slots"
        for other in (field, field.replace("slots", "memory_bytes")):
            if getattr(args, other) is not None:
                raise ConfigError(f"slots: contradicts {other}; give one", field="slots")
        setattr(args, field, args.slots)
    tiered = args.host_slots is not None or args.host_memory_bytes is not None
    unlimited = args.device_slots is None and args.device_memory_bytes is None
    if args.device is None and tiered:  # both in words: three tiers
        on_device = not unlimited
    if args.device is None:
        args.device = "emulated" if on_device else "cpu"
    if args.device == "emulated" and unlimited and profile.device is not None:
        args.device_memory_bytes = profile.device.memory_bytes
    engine = engine_config(args)
    check_predictor(engine.experts)
    output = OUTPUT_TOKENS if args.output_tokens is None else args.output_tokens
    prompt = args.prompt_tokens
    if prompt is None:
        prompt = PROMPT_TOKENS
        if args.context_tokens is not None:
            prompt = max(1, args.context_tokens - output)
    traffic = Traffic(concurrency=args.concurrency, prompt_tokens=prompt, output_tokens=output)
    for name in ("concurrency", "prompt_tokens", "output_tokens"):
        if getattr(traffic, name) < 1:
            value = getattr(traffic, name)
            raise ConfigError(f"{name}: {value} is below the minimum 1", field=name)
    return PlanRequest(
        engine=engine,
        traffic=traffic,
        hardware=args.hardware,
        foreign=args.foreign,
        trace=args.trace,
    )


def notes_of(deployment: Deployment) -> list[str]:
    """What the reader must know to trust the numbers as far as they go."""
    notes = []
    profile, engine = deployment.profile, deployment.request.engine
    if profile.source == "datasheet":
        notes.append("the hardware is known from data sheets, not measured: take it as a bound")
    if engine.model.quantize_group == "auto" and engine.model.quantize == "int4":
        notes.append("--quantize-group auto looks at the weights: sizes are of the coarsest")
    if deployment.host_slots is not None and not deployment.shape.packed:
        notes.append("experts on disk take a packed model: run `moeserve pack MODEL OUT` first")
    if engine.experts.predictor != "none":
        notes.append("what predicting itself takes is not counted")
        if deployment.request.trace is None:
            notes.append("drawn tokens foresee little: name a recorded routing with --trace")
    if deployment.device_slots is not None:
        notes.append("slots on a device are those of --device emulated, on a real one")
    return notes
