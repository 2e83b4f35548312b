"""A plan as tables on a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from moeserve.cache.expert_cache import Tier
from moeserve.planner.advice import words_of
from moeserve.planner.bound import Saturation
from moeserve.planner.plan_types import Advice, Deployment, Estimate, Limit, MemoryPlan, Range

GIB = 1 << 30
#: how much faster a phase may be than its next limit before that is said as "far"
VERY_FAR = 1000.0
#: in the place of a time that there is not: of further tokens where there is one
NONE = "n/a"


@dataclass(frozen=True)
class Plan:
    """All that a plan says. estimates: stage 1, then stage 2 where it ran."""

    deployment: Deployment
    estimates: Sequence[Estimate]
    saturation: Saturation
    advice: Sequence[Advice]
    notes: Sequence[str] = ()


def as_json(plan: Plan) -> dict[str, Any]:
    """JSON types alone; sizes in bytes, times in seconds."""
    deployment = plan.deployment
    shape, traffic = deployment.shape, deployment.request.traffic
    return {
        "model": {
            "name": shape.name,
            "model_type": shape.model_type,
            "dtype": shape.dtype,
            "num_parameters": shape.num_parameters,
            "experts": shape.num_experts,
            "weights_bytes": shape.rest_bytes + shape.expert_bytes,
            "expert_form": next((s.experts.form for s in shape.layers if s.experts), None),
            "kv_token_bytes": shape.kv_token_bytes,
        },
        "hardware": {
            "cpu": deployment.profile.cpu.name,
            "device": None if deployment.profile.device is None else deployment.profile.device.name,
            "source": deployment.profile.source,
            "threads": deployment.num_threads,
        },
        "traffic": asdict(traffic),
        "settings": {
            "kv_blocks": deployment.num_kv_blocks,
            "host_slots": deployment.host_slots,
            "device_slots": deployment.device_slots,
        },
        "memory": memory_json(deployment.memory),
        "estimates": [estimate_json(estimate) for estimate in plan.estimates],
        "saturation": asdict(plan.saturation),
        "advice": [asdict(each) for each in plan.advice],
        "notes": list(plan.notes),
    }


def memory_json(memory: MemoryPlan) -> dict[str, Any]:
    tiers = {part.tier for part in memory.parts} | memory.limits.keys()
    return {
        "fits": memory.fits,
        "parts": [{**asdict(part), "tier": part.tier.value} for part in memory.parts],
        "tiers": {
            tier.value: {
                "steady_bytes": memory.steady_bytes(tier),
                "peak_bytes": memory.peak_bytes(tier),
                "limit_bytes": memory.limits.get(tier),
            }
            for tier in sorted(tiers, key=lambda tier: tier.value)
        },
    }


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    limits = [
        {
            "phase": limit.phase,
            "resource": limit.resource.name.lower(),
            "next": limit.next_resource.name.lower(),
            "headroom": limit.headroom if limit.headroom != float("inf") else None,
        }
        for limit in estimate.limits
    ]
    return {**asdict(estimate), "limits": limits}


def show_plan(console: Console, plan: Plan) -> None:
    deployment = plan.deployment
    shape, traffic = deployment.shape, deployment.request.traffic
    profile = deployment.profile
    billions = shape.num_parameters / 1e9
    console.print(
        f"[bold]{shape.name}[/bold]: {shape.model_type}, {billions:.2f} billion parameters,"
        f" computes in {shape.dtype}"
    )
    device = "" if profile.device is None else f"; {profile.device.name}"
    console.print(f"[bold]on[/bold] {profile.cpu.name}{device} ({profile.source})", soft_wrap=True)
    console.print(
        f"[bold]for[/bold] {traffic.concurrency} at once, {traffic.prompt_tokens} prompt and"
        f" {traffic.output_tokens} output tokens each"
    )
    show_memory(console, deployment.memory)
    _show_estimates(console, plan.estimates)
    _show_saturation(console, plan)
    if plan.advice:
        console.print("\n[bold]what would help[/bold] (output tokens/s, each planned anew)")
        for line in words_of(plan.advice):
            console.print(f"  {line}", soft_wrap=True)
    for note in plan.notes:
        console.print(f"[yellow]{note}[/yellow]", soft_wrap=True)


def show_memory(console: Console, memory: MemoryPlan) -> None:
    tiers = [tier for tier in Tier if any(part.tier is tier for part in memory.parts)]
    table = _table("memory, GiB", ("part", *(tier.value for tier in tiers), ""))
    for part in memory.parts:
        cells = [f"{part.num_bytes / GIB:.3f}" if part.tier is tier else "" for tier in tiers]
        said = "at times" if part.peak_only else "" if part.exact else "about"
        table.add_row(part.name, *cells, said)
    rows = (
        ("all the time", memory.steady_bytes),
        ("at most", memory.peak_bytes),
        ("there is", lambda tier: memory.limits.get(tier, 0)),
    )
    for name, of in rows:
        table.add_row(name, *(f"{of(t) / GIB:.3f}" if of(t) else "" for t in tiers), style="bold")
    console.print(table)


def _show_estimates(console: Console, estimates: Sequence[Estimate]) -> None:
    table = _table("speed", ("", *(_stage(estimate) for estimate in estimates)))
    rows = (
        ("time to first token, ms", [(e.ttft_s, 1e3) for e in estimates]),
        ("time per output token, ms", [(e.tpot_s, 1e3) for e in estimates]),
        ("output tokens/s, all together", [(e.output_tokens_per_s, 1.0) for e in estimates]),
        ("prompt tokens/s, all together", [(e.prompt_tokens_per_s, 1.0) for e in estimates]),
    )
    for name, cells in rows:
        table.add_row(name, *(_range(value, unit) for value, unit in cells))
    rates = ["" if e.hit_rate is None else f"{e.hit_rate:.0%}" for e in estimates]
    if any(rates):
        table.add_row("experts found in the fast tier", *rates)
    console.print(table)
    for estimate in estimates:
        console.print(f"{_stage(estimate)}: {estimate.basis}", soft_wrap=True)
        for limit in estimate.limits:
            console.print(f"  {limit_words(limit)}", soft_wrap=True)


def limit_words(limit: Limit) -> str:
    """prefill waits for X; then Y, at 3.1 times the speed."""
    if limit.headroom > VERY_FAR:
        return f"{limit.phase} waits for the {limit.resource.value}; nothing else is near"
    return (
        f"{limit.phase} waits for the {limit.resource.value}; then the"
        f" {limit.next_resource.value}, at {limit.headroom:.1f} times the speed"
    )


def _show_saturation(console: Console, plan: Plan) -> None:
    found = plan.saturation
    if not found.tokens:  # no experts, or none that must come
        return
    console.print(
        f"{found.tokens:,.0f} tokens in a step would keep the arithmetic busy while weights arrive"
        f" ({found.kv_bytes / GIB:,.1f} GiB of kv at this length); kv has room for"
        f" {found.parallel_tokens:,.0f} (parallelism-memory efficiency {found.efficiency:.4f})",
        soft_wrap=True,
    )


def _stage(estimate: Estimate) -> str:
    return {"bound": "bound (stage 1)", "system": "our engine (stage 2)"}[estimate.stage]


def _range(value: Range | None, unit: float) -> str:
    if value is None:
        return NONE
    mid = _number(value.mid * unit)
    if value.low == value.high:
        return mid
    return f"{mid} ({_number(value.low * unit)} to {_number(value.high * unit)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table
