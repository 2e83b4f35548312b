"""Converted models against their dense ones, in transformers and here."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import CONTEXT, INNER, LAYERS, save_dense
from safetensors.torch import load_file, save_file
from support.model_runner import Runner, load_native
from support.settled import is_settled, reference_logits, relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeserve.config import ExpertConfig, ModelConfig
from moeserve.convert.convert import Conversion
from moeserve.convert.run import convert
from moeserve.convert.settings import METHODS, ROUTERS, ConvertSettings
from moeserve.models.registry import load_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
#: of float32, over three layers
ROUNDING = 2e-5


def run(dense: Path, out: Path, text: Path, **settings: Any) -> Conversion:
    settings = {"experts": 8, "active": 6, "window_tokens": 48, **settings}
    with torch.inference_mode():
        return convert(
            ModelConfig(model=str(dense)),
            out,
            [text],
            ConvertSettings(**settings),
            lambda stage, share: None,
        )


def load_converted(out: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.model_type == "glm4_moe"
    return model


def prompt(seed: int, length: int = CONTEXT) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_active_is_the_dense_model(
    family: str, tmp_path: Path, text: Path, seed: int
) -> None:
    dense = save_dense(tmp_path / "dense", family, seed)
    rng = random.Random(seed)
    method, share = rng.choice(METHODS), rng.choice([0.125, 0.5, None])
    made = run(tmp_path / "dense", tmp_path / "out", text, active=8, method=method,
               shared_share=share)  # fmt: skip
    tokens = prompt(seed)
    expected = reference_logits(dense, tokens)
    found = reference_logits(load_converted(tmp_path / "out"), tokens)
    assert relative_error(found, expected) < ROUNDING
    ours = load_model(ModelConfig(model=str(tmp_path / "out")), ExpertConfig())
    assert relative_error(Runner(ours).logits(tokens), expected) < ROUNDING
    assert made.quality.perplexity == pytest.approx(made.quality.dense_perplexity, rel=1e-5)


def check_agreement(reference: Any, runner: Runner, seed: int) -> None:
    """Of transformers and moeserve, on the logits of the same output."""
    compared = 0
    for number in range(6):
        tokens = prompt(seed + number, 40)
        expected = reference_logits(reference, tokens)
        if is_settled(reference, tokens, expected):
            assert relative_error(runner.logits(tokens), expected) < 1e-4
            compared += 1
    assert compared, "no prompt on which rounding decides nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_and_moeserve_agree_on_the_output(
    family: str, tmp_path: Path, text: Path, seed: int
) -> None:
    save_dense(tmp_path / "dense", family, seed)
    rng = random.Random(seed)
    router, share = rng.choice(ROUTERS), rng.choice([0.25, None])
    run(tmp_path / "dense", tmp_path / "out", text, router=router, shared_share=share)
    check_agreement(load_converted(tmp_path / "out"), Runner(load_native(tmp_path / "out")), seed)


def test_what_is_reported_is_what_transformers_computes(
    tmp_path: Path, text: Path, seed: int
) -> None:
    """The perplexities of the card, on the windows that were kept back."""
    dense = save_dense(tmp_path / "dense", "qwen3", seed)
    made = run(tmp_path / "dense", tmp_path / "out", text)
    tokens = torch.tensor([*text.read_bytes()])
    alphabet = json.loads((tmp_path / "dense" / "tokenizer.json").read_text())["model"]["vocab"]
    ids = torch.tensor([alphabet["Ġ" if t == 32 else chr(t)] for t in tokens.tolist()])
    windows = ids[: len(ids) // 48 * 48].view(-1, 48)[4::5]
    for model, said in (
        (dense, made.quality.dense_perplexity),
        (load_converted(tmp_path / "out"), made.quality.perplexity),
    ):
        assert said == pytest.approx(perplexity(model, windows), rel=2e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| converted | {made.quality.perplexity:.4f} " in card


def test_the_card_says_what_was_done(
    tmp_path: Path, text: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what was asked for, and whatever the model was called on the command line."""
    path, out = tmp_path / "my-dense", tmp_path / "out"
    save_dense(path, "llama", seed, max_position_embeddings=40)
    monkeypatch.chdir(path)
    run(Path("."), out, text, window_tokens=512, shared_share=None, max_tokens=600)
    card = (out / "README.md").read_text()
    assert "base_model: my-dense\n" in card
    assert "# my-dense as a Mixture-of-Experts" in card
    assert "in float32, windows of\n40 tokens:" in card
    assert "None" not in card
    for row in ("window_tokens | 40", "shared_share | auto", "calibration text | text.txt",
                "tokens used | 600: 480 to learn from, 120 to measure on"):  # fmt: skip
        assert f"| {row} |" in card


def perplexity(model: Any, windows: Tensor) -> float:
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    return float(loss.exp())


@pytest.mark.parametrize("method", METHODS)
def test_every_neuron_is_in_one_part(method: str, tmp_path: Path, text: Path, seed: int) -> None:
    """Bit by bit, in the dtype of the dense model; parts always on are chosen by all tokens."""
    save_dense(tmp_path / "dense", "llama", seed, torch.bfloat16)
    made = run(tmp_path / "dense", tmp_path / "out", text, method=method, shared_share=None,
               refit=False)  # fmt: skip
    before = load_file(tmp_path / "dense" / "model.safetensors")
    for layer in range(LAYERS):
        shard = load_file(tmp_path / "out" / f"model-{layer + 1:05}-of-{LAYERS + 1:05}.safetensors")
        prefix = f"model.layers.{layer}.mlp."
        places = ["shared_experts", *(f"experts.{e}" for e in range(7))]
        kinds = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
        neurons = [  # [I, 3 * H] each
            torch.cat(
                [
                    shard[f"{prefix}{place}.{kind}.weight"].T
                    if dim
                    else shard[f"{prefix}{place}.{kind}.weight"]
                    for kind, dim in kinds.items()
                ],
                dim=1,
            )
            for place in places
        ]
        assert {len(part) for part in neurons} == {INNER // 8}
        found = torch.cat(neurons)
        gate, up, down = (before[f"{prefix}{kind}.weight"] for kind in kinds)
        whole = torch.cat((gate, up, down.T), dim=1)
        assert found.dtype == whole.dtype
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, whole.tolist()))
        correction = shard[f"{prefix}gate.e_score_correction_bias"]
        always = int(made.reports[layer]["always_on"]) - 1
        assert (correction >= 0.9).tolist() == [e < always for e in range(7)]


@pytest.mark.parametrize(
    ("neurons", "parts", "dtype"),
    [(64, 32, torch.float32), (172, 43, torch.bfloat16), (96, 8, torch.bfloat16),
     (172, 4, torch.float32), (64, 8, torch.bfloat16)],
)  # fmt: skip
def test_parts_of_any_size_run_in_transformers(
    neurons: int, parts: int, dtype: torch.dtype, tmp_path: Path, text: Path, seed: int
) -> None:
    """Loaded as anybody would; its grouped products would refuse rows of an odd length."""
    save_dense(tmp_path / "dense", "llama", seed, dtype, intermediate_size=neurons)
    out = tmp_path / "out"
    made = run(tmp_path / "dense", out, text, experts=parts, active=parts - 1)
    for loaded in (dtype, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(out, dtype=loaded)
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)
    whole = neurons // parts % 8 == 0
    assert (not made.notes) == whole
    assert ("experts_implementation: eager" in (out / "README.md").read_text()) != whole
    if neurons == 96:
        assert "--experts 4 or 6 or 12 would do without" in made.notes[0]


IDLE = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "post_attention_layernorm")


@pytest.mark.parametrize("name", IDLE)
def test_a_layer_whose_ffn_gives_nothing(name: str, tmp_path: Path, text: Path, seed: int) -> None:
    """As pruning leaves them. Nothing is lost of nothing."""
    path = tmp_path / "dense"
    save_dense(path, "llama", seed)
    weights = load_file(path / "model.safetensors")
    weights[f"model.layers.1.{name}.weight"].zero_()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    method = random.Random(seed).choice(METHODS)
    for router in ROUTERS:
        out = tmp_path / router
        made = run(path, out, text, router=router, method=method)
        assert {made.reports[1][each] for each in ("lost", "lost_best", "error")} == {0.0}
        assert "nan" not in (out / "README.md").read_text()
        assert "NaN" not in json.dumps(asdict(made))
    check_agreement(load_converted(out), Runner(load_native(out)), seed)


def test_a_sliding_window_bounds_the_context(tmp_path: Path, text: Path, seed: int) -> None:
    dense = save_dense(tmp_path / "dense", "mistral", seed, sliding_window=64)
    run(tmp_path / "dense", tmp_path / "out", text, active=8)
    converted = load_converted(tmp_path / "out")
    assert converted.config.max_position_embeddings == 64
    tokens = prompt(seed, 64)
    expected = reference_logits(dense, tokens)
    assert relative_error(reference_logits(converted, tokens), expected) < ROUNDING


def test_a_converted_model_is_packed_and_quantised(tmp_path: Path, text: Path, seed: int) -> None:
    from moeserve.models.pack import pack_model

    save_dense(tmp_path / "dense", "qwen2", seed)
    run(tmp_path / "dense", tmp_path / "out", text)
    pack_model(ModelConfig(model=str(tmp_path / "out"), quantize="int8"), tmp_path / "packed")
    tokens = prompt(seed, 30)
    resident = Runner(load_native(tmp_path / "packed")).logits(tokens)
    loaded = load_model(
        ModelConfig(model=str(tmp_path / "packed")),
        ExpertConfig(host_slots=5, predictor="gate_lookahead"),
    )
    assert torch.equal(Runner(loaded).logits(tokens), resident)
    loaded.close()
    exact = Runner(load_native(tmp_path / "out")).logits(tokens)
    assert (resident - exact).norm() < 0.3 * exact.norm()
