"""The benchmark's random model: what it is called, how much it is. Needs no GPU."""

from __future__ import annotations

from pathlib import Path

import torch
from random_checkpoint import Qwen3MoeShape, write_random_checkpoint
from transformers import AutoModelForCausalLM

from moeserve.config import ExpertConfig, ModelConfig
from moeserve.models.registry import load_model


def test_transformers_and_we_load_it_whole(tmp_path: Path) -> None:
    shape = Qwen3MoeShape(2, 32, 4, 2, 8, 6, 2, 24, 50)
    path = tmp_path / "model"
    write_random_checkpoint(path, shape, torch.device("cpu"))
    peer, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    assert sum(weight.numel() for weight in peer.parameters()) == shape.num_parameters
    ours = load_model(ModelConfig(model=str(path)), ExpertConfig())
    assert ours.num_parameters == shape.num_parameters
    assert ours.dtype == torch.bfloat16


def test_active_parameters_of_the_real_shape() -> None:
    """Qwen3-30B-A3B: 30.5 billion in all, 3.3 billion active with the embedding (model card)."""
    shape = Qwen3MoeShape(48)
    embedding = shape.vocab_size * shape.hidden_size
    assert round(shape.num_parameters / 1e9, 1) == 30.5
    assert 3.3e9 <= shape.num_active_parameters + embedding < 3.4e9
