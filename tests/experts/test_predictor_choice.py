"""What `auto` stands for, by what there is, and how far ahead is looked where nobody says."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from moeserve.config import BUNDLED_MODEL, PREDICTORS, ExpertConfig
from moeserve.experts.predictor_choice import choose_predictor
from moeserve.llm import LLM
from moeserve.predictors.pregate_file import PREGATE_FILE
from moeserve.predictors.residual_weights import PREDICTORS_FILE


@pytest.mark.parametrize(
    ("settings", "trained", "name", "depth"),
    [
        ({"host_slots": 9}, False, "markov", 6),
        ({"host_slots": 9}, True, "gate_residual", 2),
        ({"device_slots": 9}, False, "gate_lookahead", 2),
        ({"device_slots": 9}, True, "gate_residual", 2),
        ({"device_slots": 9, "host_memory_bytes": 1 << 30}, False, "markov", 6),
        ({"host_slots": 9, "prefetch_depth": 3}, False, "markov", 3),
        ({}, True, "none", 2),
    ],
)
def test_auto(
    tmp_path: Path, settings: dict[str, int], trained: bool, name: str, depth: int
) -> None:
    folder = BUNDLED_MODEL if trained else tmp_path
    chosen, why = choose_predictor(ExpertConfig(predictor="auto", **settings), folder)
    assert (chosen.predictor, chosen.layers_ahead) == (name, depth)
    assert why


def test_pregate_where_it_is(tmp_path: Path) -> None:
    """After a conversion; what sees the hidden states is right more often."""
    (tmp_path / PREGATE_FILE).touch()
    for settings in ({"host_slots": 9}, {"device_slots": 9}):
        chosen, why = choose_predictor(ExpertConfig(predictor="auto", **settings), tmp_path)
        assert (chosen.predictor, chosen.layers_ahead) == ("pregate", 6)
        assert why == "pregate.safetensors is beside the model"
    (tmp_path / PREDICTORS_FILE).touch()
    chosen, _ = choose_predictor(ExpertConfig(predictor="auto", host_slots=9), tmp_path)
    assert chosen.predictor == "gate_residual"


def test_what_is_named_stays(tmp_path: Path) -> None:
    chosen, why = choose_predictor(ExpertConfig(host_slots=9, predictor="markov"), tmp_path)
    assert (chosen.predictor, chosen.layers_ahead, why) == ("markov", 6, None)
    chosen, _ = choose_predictor(ExpertConfig(host_slots=9, predictor="frequency"), tmp_path)
    assert (chosen.predictor, chosen.layers_ahead) == ("frequency", 2)


def test_the_notes_say_what_and_why(packed_int8: Path) -> None:
    with LLM(str(packed_int8), num_threads=1, host_slots=30, predictor="auto") as llm:
        notes = llm.info.notes
        assert notes["predictor"] == "gate_residual, 2 layers ahead at most"
        assert notes["predictor_choice"] == "predictors.safetensors is beside the model"


def test_the_help_says_what_auto_may_choose() -> None:
    (told,) = [each.metadata["help"] for each in fields(ExpertConfig) if each.name == "predictor"]
    choices = {"gate_residual", "pregate", "markov", "gate_lookahead", "none"}
    _, auto = told.split("auto:")
    assert set(re.findall(r"\w+", auto)) & set(PREDICTORS) == choices
