"""Which predictor `auto` stands for, and how far ahead each looks if nobody says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from moeserve.config import ExpertConfig
from moeserve.predictors.residual_weights import PREDICTORS_FILE

#: markov's chances hardly fall with the distance, and a read from disk takes two to three layers'
#: time; those that look at hidden states are right about the next layers only (docs/log.md)
MARKOV_DEPTH: Final = 6
OTHER_DEPTH: Final = 2


def choose_predictor(config: ExpertConfig, folder: Path) -> tuple[ExpertConfig, str | None]:
    """The config with a predictor in place of `auto` and a depth in place of none, and why it is
    that predictor; None where the config says so. folder: of the model."""
    name, why = config.predictor, None
    if name == "auto":
        name, why = _best(config, folder)
    depth = config.prefetch_depth or (MARKOV_DEPTH if name == "markov" else OTHER_DEPTH)
    return replace(config, predictor=name, prefetch_depth=depth), why


def _best(config: ExpertConfig, folder: Path) -> tuple[str, str]:
    if not (config.is_tiered or config.has_device_slots):
        return "none", "there is nothing to read ahead, all experts are resident"
    if (folder / PREDICTORS_FILE).exists():
        return "gate_residual", f"{PREDICTORS_FILE} is beside the model"
    if config.is_tiered:
        return "markov", "nothing was trained for the model, and reads from disk begin layers ahead"
    return "gate_lookahead", "nothing was trained for the model, and a copy takes less than a layer"
