"""The course of tuning, as a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from moeserve.convert.shards import whole_file
from moeserve.convert.tune import History
from moeserve.core import ConfigError

PICTURE = "tuning.png"
#: steps over which the noise of single batches is averaged away
SMOOTH_STEPS = 20


def check_plot() -> None:
    """ConfigError where no picture can be drawn: before anything is computed."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "tune_minutes: matplotlib, which draws the course of tuning, is not installed",
            field="tune_minutes",
            hint="pip install matplotlib",
        )


def draw_history(history: History, out: Path) -> None:
    """Divergence from the dense model over steps, and the prior-approximate loss of the routers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, divergences, priors = zip(*history.divergences, strict=True)
    left.plot(steps, divergences, color="0.8", linewidth=0.8, label="each step, its own text")
    left.plot(steps, _smooth(divergences), label=f"mean of {SMOOTH_STEPS} steps")
    label = "mean weights, text that no step learns from"
    left.plot(*zip(*history.checks, strict=True), marker=".", label=label)
    left.plot(*history.best, "o", fillstyle="none", label="what was written")
    left.set(xlabel="step", ylabel="divergence (nats per token)", ylim=(0, None))
    left.legend(fontsize=8)
    right.plot(steps, priors, color="0.8", linewidth=0.8)
    right.plot(steps, _smooth(priors))
    right.set(xlabel="step", ylabel="prior-approximate loss of the routers")
    with whole_file(out / PICTURE) as file:
        figure.savefig(file, format="png", dpi=100)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """At every step the mean of the steps before it."""
    means = []
    for stop in range(1, len(values) + 1):
        recent = values[max(0, stop - SMOOTH_STEPS) : stop]
        means.append(sum(recent) / len(recent))
    return means
