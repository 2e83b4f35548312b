"""The table and the picture of scripts/bench_emulated.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = (
    "| slots | strategy | tokens/s | over static | whole token | hits | link busy | device busy"
    " | prefetches per token | useful |\n|---|---|---|---|---|---|---|---|---|---|"
)


def markdown(rows: Sequence[Row], about: Sequence[str]) -> str:
    lines = ["# Decode with an emulated device", "", *about]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        first = own[0]
        lines += [
            "",
            f"## {model}",
            "",
            f"One expert: {first['cpu_us']:.0f} us on the CPU, {first['device_us']:.0f} us on the"
            f" device, {first['copy_us']:.0f} us over the link; shared experts"
            f" {first['shared_us']:.0f} us on the device, the rest of a layer"
            f" {first['rest_us']:.0f} us. Timed: {first['num_tokens']} tokens; learnt from:"
            f" {first['num_learnt']} tokens of other requests; popularity counted over"
            f" {first['num_counted']}. Static placement with slots for 25, 50 and 75 % hits"
            f" {', '.join(f'{hits:.1%}' for hits in first['static_hits'])} over all requests for"
            " the test. With all experts on the device:"
            f" {first['resident_tokens_per_s']:.0f} tokens/s. What is in no layer of experts, head"
            f" and dense layers, takes {first['outside_us']:.0f} us a token, which no strategy can"
            " change: `whole token` counts it, the other columns do not.",
            "",
            COLUMNS,
            *(_line(row) for row in own),
        ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    most = row["resident_tokens_per_s"] / row["tokens_per_s"] * row["gain"]
    gain = f"{row['gain']:.2f}×"
    if row["strategy"] == "static":
        gain += f" (all resident: {most:.2f}×)"
    useful = f"{row['useful_prefetches']:.0%}" if row["prefetches_per_token"] else "–"
    return (
        f"| {row['share']:.0%} | {row['strategy']} | {row['tokens_per_s']:.1f} | {gain}"
        f" | {row['whole_gain']:.2f}×"
        f" | {row['hit_rate']:.1%} | {row['link_busy']:.0%} | {row['device_busy']:.0%}"
        f" | {row['prefetches_per_token']:.1f} | {useful} |"
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Needs matplotlib (the extra [bench])."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        shares = list(dict.fromkeys(row["share"] for row in own))
        width = 0.8 / len(strategies)
        for place, strategy in enumerate(strategies):
            gains = [row["gain"] for row in own if row["strategy"] == strategy]
            left = [i + (place - (len(strategies) - 1) / 2) * width for i in range(len(gains))]
            axis.bar(left, gains, width, label=strategy)
        for i, share in enumerate(shares):
            static = next(r for r in own if r["share"] == share and r["strategy"] == "static")
            most = static["resident_tokens_per_s"] / static["tokens_per_s"]
            axis.hlines(most, i - 0.45, i + 0.45, "black", "dotted")
        axis.set_xticks(range(len(shares)), [f"{share:.0%} of the experts" for share in shares])
        axis.set_ylabel("decode tokens/s, over static placement")
        axis.set_title(f"{model} (dotted: all experts resident)")
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
