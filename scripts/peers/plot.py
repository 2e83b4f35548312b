"""How one MoE layer scales: rows, and threads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """rows: run name -> {"rows": {rows: milliseconds}}. False where no run gave figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times = {name: result["rows"] for name, result in rows.items() if "rows" in result}
    if not times:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for name, by_rows in times.items():
        counts = sorted(map(int, by_rows))
        style = ":" if ", 1 threads" in name else "-"
        left.plot(counts, [by_rows[str(n)] for n in counts], style, marker="o", label=name)
    for name, by_rows in times.items():
        if ", 1 threads" in name:
            continue
        single = times.get(f"{name.partition(',')[0]}, 1 threads")
        if single is not None:
            counts = sorted(map(int, by_rows))
            speed_up = [single[str(n)] / by_rows[str(n)] for n in counts]
            right.plot(counts, speed_up, marker="o", label=name)
    left.set(title="One MoE layer", xlabel="rows", ylabel="ms", xscale="log", yscale="log")
    right.set(title="Speed-up over 1 thread", xlabel="rows", xscale="log", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
