"""Which predictor `auto` stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moeserve.config import ExpertConfig
from moeserve.predictors.pregate_file import PREGATE_FILE
from moeserve.predictors.residual_weights import PREDICTORS_FILE


def choose_predictor(config: ExpertConfig, folder: Path) -> tuple[ExpertConfig, str | None]:
    """The config with a predictor in place of `auto`, and why that one; None where the config names
    one. folder: of the model."""
    if config.predictor != "auto":
        return config, None
    name, why = _best(config, folder)
    return replace(config, predictor=name), why


def _best(config: ExpertConfig, folder: Path) -> tuple[str, str]:
    if not (config.is_tiered or config.has_device_slots):
        return "none", "there is nothing to read ahead, all experts are resident"
    if (folder / PREDICTORS_FILE).exists():
        return "gate_residual", f"{PREDICTORS_FILE} is beside the model"
    if (folder / PREGATE_FILE).exists():
        return "pregate", f"{PREGATE_FILE} is beside the model"
    if config.is_tiered:
        return "markov", "nothing was trained for the model, and reads from disk begin layers ahead"
    return "gate_lookahead", "nothing was trained for the model, and a copy takes less than a layer"
