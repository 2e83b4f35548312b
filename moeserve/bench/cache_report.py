"""What `moeserve bench cache` says: one JSON object, a table, a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeserve.core import ConfigError

if TYPE_CHECKING:
    from moeserve.bench.cache_suite import Job, Outcome

Report = dict[str, Any]


def as_json(jobs: Sequence[Job], outcomes: Sequence[Outcome], seconds: float) -> Report:
    """The whole result, JSON types alone."""
    figures = [asdict(figure) for outcome in outcomes for figure in outcome.figures]
    groups = {
        job.path.stem: outcome.groups
        for job, outcome in zip(jobs, outcomes, strict=True)
        if outcome.groups
    }
    return {
        "benchmark": "cache",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(seconds, 1),
        "part": jobs[0].part,
        "history_tokens": jobs[0].history_tokens,
        "num_tokens": {
            f"{job.path.stem} {job.steps}": outcome.num_tokens
            for job, outcome in zip(jobs, outcomes, strict=True)
        },
        "figures": figures,
        "below_lru": {name: below_lru(rates) for name, rates in groups.items()},
        "groups": groups,
    }


def below_lru(rates: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    """Kinds of requests on which a policy of ours does worse than LRU with as many slots."""
    found = {}
    for key, by_group in rates.items():
        policy, _, share = key.partition(" ")
        baseline = rates.get(f"lru {share}")
        if policy.startswith("score") and baseline is not None:
            found[key] = [name for name, rate in by_group.items() if rate < baseline[name]]
    return found


def markdown(report: Report) -> str:
    """A table per trace, kind of step and way to share the slots: hit rate and gap closed."""
    figures = report["figures"]
    lines = []
    settings = dict.fromkeys((f["trace"], f["steps"], f["slots"]) for f in figures)
    for trace, steps, slots in settings:
        rows = [f for f in figures if (f["trace"], f["steps"], f["slots"]) == (trace, steps, slots)]
        shares = list(dict.fromkeys(f["share"] for f in rows))
        tokens = report["num_tokens"][f"{trace} {steps}"]
        lines += [f"**{trace}**, {steps}, slots {slots}, {tokens} tokens", ""]
        lines.append(
            "| policy | " + " | ".join(f"{share:.0%} of experts" for share in shares) + " |"
        )
        lines.append("| --- |" + " --- |" * len(shares))
        for policy in dict.fromkeys(f["policy"] for f in rows):
            cells = [_cell(f) for f in rows if f["policy"] == policy]
            lines.append(f"| {policy} | " + " | ".join(cells) + " |")
        lines.append("")
    for trace, found in report["below_lru"].items():
        for key, groups in found.items():
            count = len(report["groups"][trace][key])
            lines.append(
                f"{trace}: {key} is below LRU on {len(groups)} of {count} kinds of requests"
                + (f": {', '.join(groups)}" if groups else "")
            )
    return "\n".join(lines)


def _cell(figure: Mapping[str, Any]) -> str:
    closed = figure["closed"]
    return f"{figure['hit_rate']:.3f}" + ("" if closed is None else f" ({closed:.0%})")


def write(stem: Path, report: Report) -> None:
    """STEM.json, STEM.md, STEM.png. ConfigError where they cannot be written, or without
    matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "out: the plot needs matplotlib", field="out", hint="pip install 'moeserve[bench]'"
        ) from error
    matplotlib.use("agg")
    try:
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        stem.with_suffix(".md").write_text(markdown(report) + "\n")
        _plot(stem.with_suffix(".png"), report["figures"])
    except OSError as error:
        raise ConfigError(f"out: {stem}: {error.strerror}", field="out") from error


def _plot(path: Path, figures: Sequence[Mapping[str, Any]]) -> None:
    """Bars of the gap closed, one panel per trace, single steps with shared slots."""
    from matplotlib import pyplot as plt

    shown = [f for f in figures if f["steps"] == "single" and f["closed"] is not None]
    traces = list(dict.fromkeys(f["trace"] for f in shown))
    if not traces:
        return
    drawing, panels = plt.subplots(1, len(traces), figsize=(6 * len(traces), 4), squeeze=False)
    for panel, trace in zip(panels[0], traces, strict=True):
        rows = [f for f in shown if f["trace"] == trace and f["policy"] not in ("lru", "belady")]
        policies = list(dict.fromkeys(f["policy"] for f in rows))
        series = list(dict.fromkeys((f["slots"], f["share"]) for f in rows))
        width = 0.8 / len(series)
        for place, (slots, share) in enumerate(series):
            chosen = [f for f in rows if (f["slots"], f["share"]) == (slots, share)]
            left = [policies.index(f["policy"]) + (place - len(series) / 2) * width for f in chosen]
            heights = [100 * f["closed"] for f in chosen]
            panel.bar(left, heights, width, align="edge", label=f"{share:.0%}, {slots}")
        panel.set_xticks(range(len(policies)), policies, rotation=30, ha="right")
        panel.set_ylabel("gap from LRU to Belady closed, %")
        panel.set_title(trace)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.legend()
    drawing.tight_layout()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)
