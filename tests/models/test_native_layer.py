"""Halves of decoder layers in one native call give the bits of their parts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity_cases import DRAW, VOCAB, draw_config, make_reference, save
from support.model_runner import BlockSequence, Runner, load_native

from moeserve.models.native_layer import FusedHalves
from moeserve.models.spec import MlaSpec

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", list(DRAW))
def test_fused_halves_give_the_bits_of_their_parts(
    model_type: str, dtype: str, tmp_path: Path, seed: int
) -> None:
    reference = make_reference(draw_config(model_type, seed), model_type, seed)
    save(reference, tmp_path, packed=True, old_style=False)
    loaded = load_native(tmp_path, dtype=dtype)
    model = loaded.model
    for spec, layer in zip(loaded.spec.layers, model.layers, strict=True):
        assert (layer.fused.attention is None) == isinstance(spec.attention, MlaSpec)
        assert layer.fused.ffn is not None
    rng = random.Random(seed)
    prompt = [rng.randrange(VOCAB) for _ in range(70)]

    def logits() -> torch.Tensor:
        runner = Runner(loaded)
        sequence, neighbour = BlockSequence(prompt), BlockSequence(prompt[7:])
        first = runner.step([(sequence, 50), (neighbour, 3)])
        steps = [runner.step([(sequence, 1), (neighbour, 1)])[0] for _ in range(20)]
        return torch.cat([*first, *steps])

    fused = logits()
    model.layers = tuple(replace(layer, fused=FusedHalves()) for layer in model.layers)
    assert torch.equal(fused, logits())
