"""The `plan` subcommand."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

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
from moeserve.planner.printing import printing
from moeserve.planner.workload_flags import add_workload_flags, workload_if_any
from moeserve.planner.workload_outcome import SloTargets

if TYPE_CHECKING:
    from moeserve.planner.plan_report import Plan
    from moeserve.planner.recorded import Recorded

CONCURRENCY, PROMPT_TOKENS, OUTPUT_TOKENS = 1, 512, 128
#: of a gateway's process, whatever the model: as `serve` showed it here
GATEWAY_MIB = 64
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
        "--concurrency",
        type=int,
        metavar="N",
        help=f"requests at once (default: {CONCURRENCY}; of recorded traffic, as many as meet)",
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
    gc.disable()  # what imports make stays; to look through it again and again takes a tenth
    from moeserve.planner.lookup import find_hardware, find_shape
    from moeserve.planner.nearest import DoesNotFit, plan_on

    gc.freeze()
    gc.enable()
    from moeserve.planner.plan_plot import check_plot, draw
    from moeserve.planner.plan_report import Plan, memory_json, show_memory

    if args.plot is not None:
        check_plot(args.plot)
    check_no_workers(args.local_workers, args.worker)
    workload = workload_if_any(args)
    if args.bound_only and workload is not None:
        raise ConfigError(
            "bound_only: contradicts --workload: recorded traffic is simulated, which is stage 2",
            field="bound_only",
            hint="leave out one",
        )
    slo = SloTargets(args.slo_ttft, args.slo_tpot)
    profile = find_hardware(args.hardware, args.foreign)
    request = request_of(args, profile)
    shape = find_shape(request.engine)
    stages, compare = stages_of(args.bound_only)
    recorded = None
    try:
        if workload is not None:
            from moeserve.planner.recorded import Recorded

            recorded = Recorded.of(workload, slo, request, profile, shape)
            request = recorded.request
        deployment = plan_on(request, profile, shape)
    except DoesNotFit as error:
        if args.json:
            nearest = None if error.nearest is None else error.nearest.flags
            print_json({"memory": memory_json(error.plan), "nearest": nearest})
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
    show(plan, recorded, args.json)
    return 0


def show(plan: Plan, recorded: Recorded | None, as_json: bool) -> None:
    """On standard output. Raises ConfigError where that cannot be written."""
    from moeserve.planner.plan_report import as_json as json_of
    from moeserve.planner.plan_report import show_plan

    if as_json:
        document = json_of(plan)
        if recorded is not None:
            document["workload"] = recorded.as_json()
        print_json(document)
        return
    with printing():
        console = Console()
        show_plan(console, plan)
        if recorded is not None:
            recorded.show(console)


def print_json(document: dict[str, Any]) -> None:
    """Made as a whole first: no error leaves half of it behind."""
    text = json.dumps(document, indent=2)
    with printing():
        print(text)


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
        if args.slots < 1:
            raise ConfigError(f"slots: {args.slots} is below the minimum 1", field="slots")
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
    concurrency = CONCURRENCY if args.concurrency is None else args.concurrency
    traffic = Traffic(concurrency=concurrency, prompt_tokens=prompt, output_tokens=output)
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
    at_once, running = deployment.request.traffic.concurrency, engine.scheduler.max_running
    if at_once > running:
        notes.append(f"{at_once - running} of {at_once} requests wait: --max-running is {running}")
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
    if deployment.device_slots is not None and deployment.shape.num_experts:
        notes.append("slots on a device are those of --device emulated, on a real one")
        if engine.model.device.startswith("cuda") and engine.model.quantize != "none":
            notes.append(
                f"a GPU has the weights of every token in {deployment.shape.dtype}, which is more"
                f" than their {engine.model.quantize} that is listed"
            )
    notes.append(
        f"memory is the engine's: the gateway of `serve` is a process of about {GATEWAY_MIB} MiB"
        " beside it"
    )
    return notes
