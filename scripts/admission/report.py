"""The runs in tables: summaries over pools, loads and windows."""

from __future__ import annotations

from typing import Any

from admission.runs import LOADS, POLICIES
from admission.traces import WINDOWS


def mean_capacity(settings: list[dict[str, Any]]) -> float | None:
    """Over the pools; None when one has none."""
    known = [s["capacity"] for s in settings if s["capacity"] is not None]
    return round(sum(known) / len(known), 4) if len(known) == len(settings) else None


def summarise(settings: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per trace and policy: goodput and the longest TTFT as means over all runs, mean capacity,
    requests within the SLO and evictions as sums."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for trace in WINDOWS:
        for policy in POLICIES:
            own = [s for s in settings if s["trace"] == trace and s["policy"] == policy]
            rows = [row for setting in own for row in setting["rows"]]
            summary.setdefault(trace, {})[policy] = {
                "goodput_per_s": round(sum(r["goodput_per_s"] for r in rows) / len(rows), 4),
                "capacity": mean_capacity(own),
                "in_time": sum(r["in_time"] for r in rows),
                "worst_ttft_s": round(sum(r["worst_ttft_s"] for r in rows) / len(rows), 2),
                "preemptions": sum(r["preemptions"] for r in rows),
                "recomputed_tokens": sum(r["recomputed_tokens"] for r in rows),
            }
    return summary


def over_windows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One line for the windows of one setting and load: means, and sums of what is counted."""
    means = ("goodput_per_s", "slo_attained", "mean_ttft_s", "worst_ttft_s", "mean_kv_use")
    sums = ("late_first_tokens", "long_gaps", "preemptions", "recomputed_tokens")
    return {
        **{key: rows[0][key] for key in ("trace", "pool", "load", "policy")},
        **{key: round(sum(row[key] for row in rows) / len(rows), 4) for key in means},
        **{key: sum(row[key] for row in rows) for key in sums},
    }


def table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    cells = [["none" if row[c] is None else str(row[c]) for c in columns] for row in rows]
    return lines + ["| " + " | ".join(row) + " |" for row in cells]


def markdown(record: dict[str, Any]) -> str:
    overhead, settings = record["overhead_at_64_running"], record["settings"]
    totals = [
        {"trace": trace, "policy": policy, **own}
        for trace, policies in record["summary"].items()
        for policy, own in policies.items()
    ]
    lines = [
        over_windows([row for row in setting["rows"] if row["load"] == load])
        for setting in settings
        for load in LOADS
    ]
    head = [
        f"# Admission rules, {record['date']}",
        "",
        f"`{record['command']}`, {record['wall_s']} s on {record['machine']['cpu']}, "
        f"{record['machine']['cores']} cores, Python {record['machine']['python']}. Simulated "
        "clock, real scheduler and block manager; the script's docstring states every rule.",
        "",
        "At 64 running sequences and 17 that wait and are refused, each smaller than the one "
        f"before it, median of 200 steps: `schedule` {overhead['schedule_median_us']} us, `commit` "
        f"{overhead['commit_median_us']} us.",
        "",
        "Per trace: goodput and the longest TTFT as means of all runs, requests in time (within "
        "the SLO) and evictions as sums of all runs at the three loads, capacity (highest load "
        "with 90 % of requests within the SLO) as the mean of its pools:",
        "",
    ]
    costs = ("preemptions", "recomputed_tokens")
    latencies = ("mean_ttft_s", "worst_ttft_s", "late_first_tokens", "long_gaps")
    measures = ("goodput_per_s", "slo_attained", *latencies)
    sums = ("goodput_per_s", "in_time", "capacity", "worst_ttft_s")
    return "\n".join(
        [
            *head,
            *table(("trace", "policy", *sums, *costs), totals),
            *["", "Capacity of every pool:", ""],
            *table(("trace", "pool", "policy", "capacity"), settings),
            *["", "Every load, over its three windows (means; counts are sums):", ""],
            *table(("trace", "pool", "load", "policy", *measures, *costs, "mean_kv_use"), lines),
            "",
        ]
    )
