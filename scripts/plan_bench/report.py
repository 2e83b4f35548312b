"""Predicted beside measured: a table, what it comes to, a scatter plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("tokens_per_s", "ttft_s", "tpot_s")
NAMES = {
    "tokens_per_s": "output tokens/s",
    "ttft_s": "time to first token, s",
    "tpot_s": "time per output token, s",
}
CALIBRATED_DISK = "with_calibrated_disk"
MARKS = {100: "o", 75: "^", 50: "s", 25: "v"}


def accuracy(predicted: float, measured: float) -> float:
    """1 less the error, as a share of what was measured."""
    return 1 - abs(predicted - measured) / measured


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """rows: of the cases, each with "measured" and "predicted"."""
    summary: dict[str, Any] = {"configurations": len(rows)}
    for part in PARTS:
        summary[part] = _accuracies(rows, "predicted", part)
        summary[f"{part}_{CALIBRATED_DISK}"] = _accuracies(rows, CALIBRATED_DISK, part)
    memory = [accuracy(r["predicted"]["rss_bytes"], r["measured"]["rss_bytes"]) for r in rows]
    summary["memory"] = {
        "mean_error": round(1 - float(np.mean(memory)), 4),
        "worst_error": round(1 - min(memory), 4),
        "worst": rows[int(np.argmin(memory))]["name"],
    }
    summary["inside_the_range"] = _inside(rows, "predicted")
    summary[f"inside_the_range_{CALIBRATED_DISK}"] = _inside(rows, CALIBRATED_DISK)
    return summary


def _inside(rows: list[dict[str, Any]], which: str) -> float:
    """Share of the measured throughputs that lie between the prediction's ends."""
    inside = [
        row[which]["low"] <= row["measured"]["tokens_per_s"] <= row[which]["high"] for row in rows
    ]
    return round(float(np.mean(inside)), 4)


def _accuracies(rows: list[dict[str, Any]], which: str, part: str) -> dict[str, Any]:
    found = [accuracy(row[which][part], row["measured"][part]) for row in rows]
    return {
        "mean_accuracy": round(float(np.mean(found)), 4),
        "worst_accuracy": round(min(found), 4),
        "worst": rows[int(np.argmin(found))]["name"],
    }


def markdown(record: dict[str, Any]) -> str:
    rows, summary, machine = record["rows"], record["summary"], record["machine"]
    lines = [
        f"# Predicted and measured, {record['date']}",
        "",
        f"`{record['command']}` on {machine['cpu']}, {machine['cores']} cores, profile of"
        f" {record['profile_date']}. No configuration was used for calibration. Throughput and"
        " times are those of clients that wait for their answers, all busy; a case is a process"
        f" of its own. {record['output_tokens']} output tokens each.",
        "",
        "The first three lines are what `moeserve plan` says. The disk was looked at again beside"
        " each case that reads from it; the last three lines are of predictions made from that.",
        "",
        "| what | mean accuracy | worst | of |",
        "| --- | --- | --- | --- |",
        *(_summary_line(NAMES[part], summary[f"{part}_{CALIBRATED_DISK}"]) for part in PARTS),
        *(
            _summary_line(f"{NAMES[part]}, disk as beside the case", summary[part])
            for part in PARTS
        ),
        "",
        f"Memory: {summary['memory']['mean_error']:.1%} off on average, at most"
        f" {summary['memory']['worst_error']:.1%} ({summary['memory']['worst']})."
        f" {summary[f'inside_the_range_{CALIBRATED_DISK}']:.0%} of the measured throughputs lie in"
        f" the range of `moeserve plan`, {summary['inside_the_range']:.0%} in that with the disk as"
        " beside the case.",
        "",
        "| model | streams | context | share | tokens/s measured (slowest, fastest) | predicted |"
        " accuracy | with the calibrated disk | TTFT, s | predicted | TPOT, ms | predicted | hits |"
        " predicted | MiB | predicted |",
        "| --- " * 16 + "|",
        *(_row(row) for row in rows),
        "",
    ]
    return "\n".join(lines)


def _summary_line(name: str, found: dict[str, Any]) -> str:
    return (
        f"| {name} | {found['mean_accuracy']:.1%} | {found['worst_accuracy']:.1%} |"
        f" {found['worst']} |"
    )


def _row(row: dict[str, Any]) -> str:
    measured, predicted = row["measured"], row["predicted"]
    speed = accuracy(predicted["tokens_per_s"], measured["tokens_per_s"])
    cells = (
        f"{row['shape']}, {'bf16' if row['quantize'] == 'none' else row['quantize']}",
        row["num_streams"],
        row["context_tokens"],
        f"{row['share']}%",
        f"{measured['tokens_per_s']:.1f} ({measured['slowest']:.1f}, {measured['fastest']:.1f})",
        f"{predicted['tokens_per_s']:.1f}",
        f"{speed:.1%}",
        f"{accuracy(row[CALIBRATED_DISK]['tokens_per_s'], measured['tokens_per_s']):.1%}",
        f"{measured['ttft_s']:.3f}",
        f"{predicted['ttft_s']:.3f}",
        f"{measured['tpot_s'] * 1e3:.1f}",
        f"{predicted['tpot_s'] * 1e3:.1f}",
        f"{measured['hit_rate']:.0%}",
        f"{predicted['hit_rate']:.0%}",
        f"{measured['rss_bytes'] / 2**20:.0f}",
        f"{predicted['rss_bytes'] / 2**20:.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def draw(path: Path, record: dict[str, Any]) -> None:
    """Measured against predicted, with lines at 80 % accuracy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.3), layout="constrained")
    summary = record["summary"]
    for axes, part in zip(figure.subplots(1, len(PARTS)), PARTS, strict=True):
        for share, mark in MARKS.items():
            rows = [row for row in record["rows"] if row["share"] == share]
            x = [row["measured"][part] for row in rows]
            y = [row["predicted"][part] for row in rows]
            axes.plot(x, y, mark, label=f"{share}% in memory", markersize=5, alpha=0.8)
        every = [row["measured"][part] for row in record["rows"]]
        ends = np.array([min(every) * 0.8, max(every) * 1.25])
        axes.plot(ends, ends, "k-", linewidth=0.8)
        axes.fill_between(ends, ends * 0.8, ends * 1.2, color="grey", alpha=0.15)
        axes.set(xscale="log", yscale="log", xlabel="measured", ylabel="predicted")
        axes.set_title(f"{NAMES[part]}: {summary[part]['mean_accuracy']:.1%}", fontsize=10)
    axes.legend(fontsize=8)
    machine = record["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['cores']} cores, {record['date']}; disk measured beside each"
        " case",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
