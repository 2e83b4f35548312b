"""Recall by layer as a picture; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from moeserve.cli_options import check_output
from moeserve.core import ConfigError
from moeserve.predictor_tools.evaluation import PredictorReport


def check_plot(path: Path) -> None:
    """Raises ConfigError, before anything is computed, where no picture could be written."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "plot: matplotlib is not installed", field="plot", hint="pip install matplotlib"
        )
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"plot: {path} is no .png, .svg or .pdf", field="plot")
    check_output("plot", path)


def plot_recall(results: Sequence[PredictorReport], path: Path) -> None:
    """One panel per distance: recall@k over the layer that is looked from."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    distances = sorted({far for result in results for far in result.mean})
    figure = Figure(figsize=(4.5 * len(distances), 3.6), layout="constrained")
    panels = figure.subplots(1, len(distances), sharey=True, squeeze=False)[0]
    for panel, distance in zip(panels, distances, strict=True):
        for result in results:
            points = sorted(
                (layer, each["recall_k"])
                for (layer, far), each in result.by_layer.items()
                if far == distance
            )
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", label=result.name)
        panel.set_title(f"{distance} MoE layer{'s' if distance > 1 else ''} ahead")
        panel.set_xlabel("seen from layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("recall@k")
    panels[0].set_ylim(0, 1)
    panels[0].legend()
    figure.savefig(path, dpi=120)
