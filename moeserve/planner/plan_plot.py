"""Throughput over concurrency and over the size of the fast tier, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from moeserve.core import ConfigError
from moeserve.planner.deployment import sized
from moeserve.planner.plan_types import Deployment, Estimate, PlanRequest

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
Estimator = Callable[[Deployment], Estimate]


@dataclass(frozen=True)
class Line:
    """One stage: output tokens per second over what is changed, with the range."""

    stage: str
    x: list[float]
    low: list[float]
    mid: list[float]
    high: list[float]


def check_plot(path: Path) -> None:
    """ConfigError where no picture can be written: before anything is computed."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "plot: matplotlib is not installed", field="plot", hint="pip install matplotlib"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"plot: {path.parent} is no directory", field="plot")
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise ConfigError(
            f"plot: {path.name!r}: no kind of picture; there are {', '.join(sorted(kinds))}",
            field="plot",
        )


def draw(path: Path, deployment: Deployment, stages: Sequence[Estimator]) -> None:
    """stages: the bound first. Raises ConfigError where `path` cannot be written."""
    from matplotlib.figure import Figure

    bound = stages[0]
    stages = [bound, *(_within(stage, bound) for stage in stages[1:])]
    shape, request = deployment.shape, deployment.request
    more = [
        (float(count), replace(request, traffic=replace(request.traffic, concurrency=count)))
        for count in CONCURRENCIES
    ]
    panels: list[tuple[str, list[Line | None]]] = [
        ("requests at once", [_line(stage, deployment, more) for stage in stages]),
        ("experts in the fast tier, %", [_share_line(stage, deployment) for stage in stages]),
    ]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(f"{shape.name} on {deployment.profile.cpu.name}: output tokens/s", fontsize=10)
    for axes, (label, lines) in zip(figure.subplots(1, 2), panels, strict=True):
        for line in lines:
            if line is None:
                continue
            style = "--" if line.stage == "bound" else "-o"
            axes.plot(line.x, line.mid, style, label=line.stage, markersize=3)
            axes.fill_between(line.x, line.low, line.high, alpha=0.2)
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    part = path.with_name(f".{path.name}")
    try:
        figure.savefig(part, format=path.suffix.removeprefix("."), dpi=150)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"plot: {path}: {error.strerror}", field="plot") from error


def _within(stage: Estimator, bound: Estimator) -> Estimator:
    """The stage with ranges that end where the bound does."""
    return lambda deployment: stage(deployment).within(bound(deployment))


def _share_line(stage: Estimator, deployment: Deployment) -> Line | None:
    """None for a dense model, and where nobody knows how fast the slow tier is."""
    total, profile = deployment.shape.num_experts, deployment.profile
    on_device = deployment.device_slots is not None
    if not total or not (profile.link if on_device else profile.disk):
        return None
    engine = deployment.request.engine
    steps = []
    for share in SHARES:
        slots = max(2, round(share * total))
        if on_device:
            experts = replace(engine.experts, device_slots=slots, device_memory_bytes=None)
        else:
            experts = replace(engine.experts, host_slots=slots, host_memory_bytes=None)
        changed = replace(engine, experts=experts)
        steps.append((100 * share, replace(deployment.request, engine=changed)))
    return _line(stage, deployment, steps)


def _line(
    stage: Estimator, deployment: Deployment, steps: Sequence[tuple[float, PlanRequest]]
) -> Line:
    found = list(_points(stage, deployment, steps))
    ranges = [estimate.output_tokens_per_s for _, estimate in found]
    return Line(
        stage=found[0][1].stage,
        x=[x for x, _ in found],
        low=[each.low for each in ranges],
        mid=[each.mid for each in ranges],
        high=[each.high for each in ranges],
    )


def _points(
    stage: Estimator, deployment: Deployment, steps: Sequence[tuple[float, PlanRequest]]
) -> Iterator[tuple[float, Estimate]]:
    for x, request in steps:
        yield x, stage(sized(request, deployment.profile, deployment.shape))
