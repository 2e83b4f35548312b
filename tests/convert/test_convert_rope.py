"""Rotary embeddings of every kind, with and without a sliding window, come through a conversion."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from dense_models import edit_config, save_dense
from support.model_runner import Runner
from support.settled import reference_logits, relative_error
from test_convert import ROUNDING, load_converted, prompt, run
from transformers import AutoModelForCausalLM

from moeserve.config import ExpertConfig, ModelConfig
from moeserve.models.registry import load_model

WINDOW = 64
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.0, 3.0],
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn of the context": {"rope_type": "yarn", "factor": 2.0},
    "yarn with a temperature": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3,
                                "beta_fast": 16.0, "beta_slow": 2.0,
                                "original_max_position_embeddings": 32},
    "longrope": LONG,
    "longrope with a factor": {**LONG, "factor": 8.0},
}  # fmt: skip
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW, "head_dim": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "llama": {},
}


def check_same_logits(dense: Any, out: Path, tokens: list[int]) -> None:
    """In transformers and here."""
    expected = reference_logits(dense, tokens)
    assert relative_error(reference_logits(load_converted(out), tokens), expected) < ROUNDING
    ours = load_model(ModelConfig(model=str(out)), ExpertConfig())
    assert relative_error(Runner(ours).logits(tokens), expected) < ROUNDING


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", WINDOWS)
def test_scaling_with_and_without_a_window(
    family: str, scaling: str, tmp_path: Path, text: Path, seed: int
) -> None:
    rope = {**SCALINGS[scaling], "rope_theta": 5000.0}
    dense = save_dense(
        tmp_path / "dense", family, seed, rope_parameters=rope, num_hidden_layers=2,
        **WINDOWS[family],
    )  # fmt: skip
    run(tmp_path / "dense", tmp_path / "out", text, active=8, method="contiguous")
    check_same_logits(dense, tmp_path / "out", prompt(seed, WINDOW))


def test_long_rope_as_phi3_writes_it(
    tmp_path: Path, text: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The original context stands outside of rope_scaling, and all names are the old ones."""
    path = tmp_path / "dense"
    save_dense(path, "llama", seed, rope_parameters={**LONG, "rope_theta": 5000.0})
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    rope["type"] = rope.pop("rope_type")
    outside = {name: rope.pop(name) for name in ("rope_theta", "original_max_position_embeddings")}
    (path / "config.json").write_text(json.dumps(config))
    edit_config(path, rope_scaling=rope, **outside)
    dense = AutoModelForCausalLM.from_pretrained(path).eval()
    run(path, tmp_path / "out", text, active=8, method="contiguous")
    check_same_logits(dense, tmp_path / "out", prompt(seed))
    with caplog.at_level(logging.WARNING, logger="transformers"):
        load_converted(tmp_path / "out")
    assert not [r for r in caplog.records if "factor" in r.getMessage()]
