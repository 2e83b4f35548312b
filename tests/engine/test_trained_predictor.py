"""gate_residual while serving: found beside the model or where it is said, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moeserve.config import BUNDLED_MODEL, ExpertConfig
from moeserve.core import ConfigError
from moeserve.llm import LLM
from moeserve.predictors.residual_weights import PREDICTORS_FILE

PROMPTS = ["Once upon a time, there was a", "def read_lines(path):"]
TRAINED = BUNDLED_MODEL / PREDICTORS_FILE


def answers(packed_int8: Path, **settings: object) -> list[str]:
    with LLM(str(packed_int8), num_threads=1, host_slots=30, **settings) as llm:
        return [each.text for each in llm.generate(PROMPTS, max_tokens=24, temperature=0.0)]


def test_the_tokens_do_not_depend_on_it(packed_int8: Path) -> None:
    expected = answers(packed_int8)
    trained = {"predictor": "gate_residual", "predictor_file": TRAINED}
    assert answers(packed_int8, **trained) == expected
    assert answers(packed_int8, **trained, prefetch_depth=1) == expected


def test_it_is_looked_for_beside_the_model(packed_int8: Path, tmp_path: Path) -> None:
    """`moeserve pack` takes it along."""
    bare = tmp_path / "bare"
    shutil.copytree(packed_int8, bare, ignore=shutil.ignore_patterns("predictors.*"))
    with pytest.raises(ConfigError, match="predictors train"):
        answers(bare, predictor="gate_residual")
    assert answers(packed_int8, predictor="gate_residual") == answers(packed_int8)


def test_another_models_is_refused(packed_int8: Path, tmp_path: Path) -> None:
    file = tmp_path / PREDICTORS_FILE
    shutil.copy(TRAINED, file)
    about = TRAINED.with_suffix(".json").read_text()
    file.with_suffix(".json").write_text(about.replace('"config_sha256": "', '"config_sha256": "0'))
    with pytest.raises(ConfigError, match="another model"):
        answers(packed_int8, predictor="gate_residual", predictor_file=file)


def test_a_file_for_a_predictor_that_takes_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="predictor_file"):
        ExpertConfig(host_slots=8, predictor="markov", predictor_file=Path("x"))
