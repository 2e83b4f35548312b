"""Which experts are used how much, as a picture: layers down, experts across."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeserve.cli_options import check_output
from moeserve.core import ConfigError

#: uses of an expert in units of its layer's mean at which the colours end
HOTTEST = 4.0


@dataclass(frozen=True)
class Use:
    """counts: rows that chose each expert, by MoE layer (its index in the model)."""

    title: str
    counts: dict[int, list[int]]


def check_picture(path: Path) -> None:
    """Raises ConfigError, before anything is recorded, where no picture could be written."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "heatmap: matplotlib is not installed",
            field="out",
            hint="pip install 'moeserve[bench]'",
        )
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"out: {path} is no .png, .svg or .pdf", field="out")
    check_output("out", path)


def read_use(path: Path) -> Use:
    """Of the routing in an npz file. Raises MoeserveError for a file that holds none."""
    from moeserve.cache.routing_trace import load_trace

    trace = load_trace(path)
    counts = {
        layer: np.bincount(trace.ids[:, place].ravel(), minlength=trace.num_experts).tolist()
        for place, layer in enumerate(trace.layers)
    }
    return Use(f"{trace.name}: {len(trace.ids)} tokens", counts)


def relative_use(use: Use) -> NDArray[np.float64]:
    """[L, E] counts over their layer's mean; NaN where a layer has fewer experts, or no use."""
    width = max(map(len, use.counts.values()))
    table = np.full((len(use.counts), width), np.nan)
    for row, (_, counts) in enumerate(sorted(use.counts.items())):
        if sum(counts):
            table[row, : len(counts)] = np.array(counts) / np.mean(counts)
    return table


def plot_use(use: Use, path: Path) -> None:
    """matplotlib must be there: `check_picture`."""
    from matplotlib.figure import Figure

    table = relative_use(use)
    num_layers, num_experts = table.shape
    size = (max(6.0, 0.09 * num_experts + 2), max(2.4, 0.16 * num_layers + 1))
    figure = Figure(figsize=size, layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(
        table, aspect="auto", interpolation="nearest", vmin=0, vmax=HOTTEST, cmap="magma"
    )
    layers = sorted(use.counts)
    every = max(1, num_layers // 12)
    panel.set_yticks(range(0, num_layers, every), [str(layer) for layer in layers[::every]])
    panel.set_ylabel("layer")
    panel.set_xlabel("expert")
    panel.set_title(use.title, fontsize="medium")
    figure.colorbar(image, ax=panel, extend="max").set_label("uses / layer's mean")
    figure.savefig(path, dpi=120)
