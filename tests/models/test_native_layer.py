"""Decoder layers, and halves of them, in one native call give the bits of their parts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_cases import DRAW, VOCAB, draw_config, make_reference, save
from support.model_runner import BlockSequence, Runner, load_native

from moeserve.cpu_backend import _native
from moeserve.models.kv_pool import KvPool
from moeserve.models.native_layer import FusedHalves
from moeserve.models.spec import MlaSpec

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", list(DRAW))
def test_fused_layers_give_the_bits_of_their_parts(
    model_type: str, dtype: str, tmp_path: Path, seed: int
) -> None:
    reference = make_reference(draw_config(model_type, seed), model_type, seed)
    save(reference, tmp_path, packed=True, old_style=False)
    loaded = load_native(tmp_path, dtype=dtype)
    model = loaded.model
    for spec, layer in zip(loaded.spec.layers, model.layers, strict=True):
        assert (layer.fused.attention is None) == isinstance(spec.attention, MlaSpec)
        assert layer.fused.ffn is not None
        assert layer.joins == (None if layer.fused.attention is None else spec.attention.rope)
    rng = random.Random(seed)
    prompt = [rng.randrange(VOCAB) for _ in range(70)]

    def logits() -> torch.Tensor:
        runner = Runner(loaded)
        sequence, neighbour = BlockSequence(prompt), BlockSequence(prompt[7:])
        first = runner.step([(sequence, 50), (neighbour, 3)])
        steps = [runner.step([(sequence, 1), (neighbour, 1)])[0] for _ in range(20)]
        return torch.cat([*first, *steps])

    fused = logits()
    ran = model._together._seconds > 0
    assert ran.tolist() == [layer.joins is not None for layer in model.layers]
    timeline = loaded.runtime.watch.timeline
    timeline.start()  # it shows every layer, so each is called by itself
    assert all(layer.joins is None for layer in model.layers)
    assert torch.equal(fused, logits())
    timeline.stop()
    whole = model.layers
    for parity in range(2):
        model.layers = tuple(
            replace(layer, fused=FusedHalves()) if layer.index % 2 == parity else layer
            for layer in whole
        )
        assert torch.equal(fused, logits())
    model.layers = tuple(replace(layer, fused=FusedHalves()) for layer in model.layers)
    assert torch.equal(fused, logits())


def test_layers_that_cannot_run_together_are_refused(tmp_path: Path, seed: int) -> None:
    reference = make_reference(draw_config("qwen3_moe", seed), "qwen3_moe", seed)
    save(reference, tmp_path, packed=True, old_style=False)
    loaded = load_native(tmp_path, dtype="float32")
    runtime, spec = loaded.runtime.native, loaded.spec
    assert runtime is not None
    halves = [layer.fused.layer for layer in loaded.model.layers]
    assert None not in halves
    seconds = np.zeros(len(halves))
    kv = KvPool(spec, 2, 4, torch.float32, loaded.device)
    dim = spec.layers[0].attention.rope.dim
    rest = (
        _native.AttentionSpans([(0, 1, 1, torch.tensor([3]))]),
        torch.ones(1, 1, 1, dim),
        torch.zeros(1, 1, 1, dim),
        kv.native,
        torch.tensor([3]),
    )
    x = torch.ones(1, spec.hidden_size)
    stack = _native.LayerStack(halves, seconds)
    stack.run(runtime.handle, 0, len(halves), x, *rest)
    assert (seconds > 0).all()
    assert not torch.equal(x, torch.ones_like(x))
    for first, stop in ((0, 0), (1, len(halves) + 1), (len(halves), len(halves))):
        with pytest.raises(ValueError, match="first, stop"):
            stack.run(runtime.handle, first, stop, x, *rest)
    with pytest.raises(ValueError, match="x: shape"):
        stack.run(runtime.handle, 0, 1, torch.ones(1, spec.hidden_size + 1), *rest)
    gaps = _native.LayerStack([None, *halves[1:]], seconds)
    with pytest.raises(ValueError, match="layers: 0 has to run in its parts"):
        gaps.run(runtime.handle, 0, 1, x, *rest)
    with pytest.raises(ValueError, match="seconds"):
        _native.LayerStack(halves, seconds[1:])
    with pytest.raises(ValueError, match="entries"):
        _native.KvLayers(["text"])
