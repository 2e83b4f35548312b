"""What cannot be converted is refused before anything is written, with the reason and the fix."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import edit_config, save_dense
from safetensors.torch import load_file, save_file
from test_convert import run

from moeserve.config import BUNDLED_MODEL
from moeserve.convert.settings import METHODS, ConvertSettings
from moeserve.core import ConfigError, ModelError, MoeserveError

WEIGHTS = "model.safetensors"


@pytest.fixture
def dense(tmp_path: Path, seed: int) -> Path:
    save_dense(tmp_path / "dense", "qwen3", seed, tie_word_embeddings=True)
    return tmp_path / "dense"


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def refused(dense: Path, out: Path, text: Path, match: str, **settings: Any) -> MoeserveError:
    with pytest.raises(MoeserveError, match=match) as caught:
        run(dense, out, text, **settings)
    assert not out.exists()
    return caught.value


def test_a_mixture_of_experts(tmp_path: Path, text: Path) -> None:
    refused(
        Path(BUNDLED_MODEL), tmp_path / "out", text, "qwen3_moe is a Mixture-of-Experts already"
    )


def test_an_ffn_that_does_not_divide(dense: Path, tmp_path: Path, text: Path) -> None:
    match = r"7 does not divide the FFN's 64 neurons \(choose a divisor, such as 4, 8"
    refused(dense, tmp_path / "out", text, match, experts=7, active=5)


def test_fused_weights(dense: Path, tmp_path: Path, text: Path) -> None:
    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        prefix = "model.layers.0.mlp."
        parts = [tensors.pop(f"{prefix}{kind}_proj.weight") for kind in ("gate", "up")]
        tensors[f"{prefix}gate_up_proj.weight"] = torch.cat(parts)

    change_weights(dense, fuse)
    refused(dense, tmp_path / "out", text, "fused projections, such as .*save it with transformers")


def test_tied_weights_that_differ(dense: Path, tmp_path: Path, text: Path) -> None:
    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    change_weights(dense, untie)
    refused(dense, tmp_path / "out", text, "differ, though config.json ties them")


def test_missing_and_misshapen_weights(dense: Path, tmp_path: Path, text: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(31)

    change_weights(dense, spoil)
    refused(dense, tmp_path / "out", text, r"missing .*up_proj.*misshapen .*model\.norm")


@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight",
     "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.k_norm.weight"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite(
    name: str, value: str, dense: Path, tmp_path: Path, text: Path
) -> None:
    """Wherever they are, in rows that no token of the text uses, too."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][-1] = float(value)

    change_weights(dense, spoil)
    match = rf"not finite: 1 \({re.escape(name)}: .*the checkpoint is damaged"
    refused(dense, tmp_path / "out", text, match)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.o_proj"])
def test_weights_that_are_too_large(
    name: str, method: str, dense: Path, tmp_path: Path, text: Path
) -> None:
    """Finite ones whose squares are not."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"model.layers.1.{name}.weight"][3, 4] = 1e25

    change_weights(dense, spoil)
    match = rf"model\.layers\.1: .*too large for squares in float32.* 1e\+25, in .*{name}"
    with pytest.raises(ModelError, match=match):
        run(dense, tmp_path / "out", text, method=method)


@pytest.mark.parametrize(
    ("name", "factor", "match"),
    [
        ("model.embed_tokens.weight", 1e25, r"too large .* in model\.embed_tokens"),
        ("model.norm.weight", 1e6, r"nats per token .* below 700: .*from norm or"),
    ],
)
def test_an_embedding_or_logits_that_are_too_large(
    name: str, factor: float, match: str, dense: Path, tmp_path: Path, text: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] *= factor

    change_weights(dense, spoil)
    with pytest.raises(ModelError, match=match):
        run(dense, tmp_path / "out", text)
    assert not (tmp_path / "out" / "README.md").exists()


def test_what_glm4_moe_cannot_express(tmp_path: Path, text: Path, seed: int) -> None:
    save_dense(tmp_path / "dense", "llama", seed, attention_bias=True)
    refused(tmp_path / "dense", tmp_path / "out", text, "attention_bias with a bias after")
    save_dense(tmp_path / "mlp", "llama", seed, mlp_bias=True)
    refused(tmp_path / "mlp", tmp_path / "out", text, "mlp_bias")


def test_too_little_text(dense: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("word " * 30)
    refused(dense, tmp_path / "out", short, "3 windows of 48 tokens; 5 or more .*give more text")
    refused(
        dense, tmp_path / "out", short, "tokens: 239; allowed: 240 or more, 5 windows of 48",
        max_tokens=239,
    )  # fmt: skip
    short.write_text("word")
    refused(dense, tmp_path / "out", short, "4 tokens do not fill a window of 48")


def test_text_in_another_encoding(dense: Path, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Käse und Öl ".encode("latin-1") * 100)
    refused(
        dense, tmp_path / "out", latin, "latin.txt cannot be read: .utf-8. codec.*save it as UTF-8"
    )


def test_a_tokenizer_of_another_model(dense: Path, tmp_path: Path, seed: int) -> None:
    save_dense(tmp_path / "small", "qwen3", seed, vocab_size=70)
    text = tmp_path / "text.txt"
    text.write_text("~" * 2000)
    refused(tmp_path / "small", tmp_path / "out", text, "the tokeniser gives token .* knows 70")


def test_an_output_that_is_not_empty(dense: Path, tmp_path: Path, text: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(ConfigError, match=r"out exists and is not empty \(name a new directory"):
        run(dense, tmp_path / "out", text)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["note"]
    with pytest.raises(ConfigError, match="is the dense model"):
        run(dense, dense, text)


def test_an_output_that_is_no_directory(dense: Path, tmp_path: Path, text: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    for out, match in (
        (file, r"is, or is below, a file and not a directory \(name a new"),
        (file / "below", r"is, or is below, a file and not a directory \(name a new"),
        (link, r"is a link to .*nowhere, which is not there \(make that directory"),
    ):
        with pytest.raises(ConfigError, match=match):
            run(dense, out, text)
    assert file.read_text() == "mine"
    assert not link.exists()


def test_no_model(tmp_path: Path, text: Path) -> None:
    refused(tmp_path / "nothing", tmp_path / "out", text, "nothing")


@pytest.mark.parametrize("kind", ["gpt2", "gemma", None, 3])
def test_another_type(kind: object, dense: Path, tmp_path: Path, text: Path) -> None:
    edit_config(dense, model_type=kind)
    match = rf"model_type: {kind!r}; allowed: llama, mistral, qwen2, qwen3 \("
    refused(dense, tmp_path / "out", text, match)


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("found", ["x", -1, 260, [1, 260], [True], 1.5])
def test_an_end_token_that_is_none(
    where: str, found: object, dense: Path, tmp_path: Path, text: Path
) -> None:
    (dense / "generation_config.json").unlink()
    file = dense / where
    told = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**told, "eos_token_id": found}))
    match = rf"{where}: eos_token_id: {re.escape(repr(found))}; allowed: .* 0 to 259"
    refused(dense, tmp_path / "out", text, match)


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_seed_is_one(method: str, dense: Path, tmp_path: Path, text: Path) -> None:
    run(dense, tmp_path / "out", text, seed=2**32 - 1, method=method,
        pregate=method == "random")  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"experts": 2}, "experts: 2; allowed: 3 or more"),
        ({"active": 9}, r"active: 9; allowed: 2 to experts \(8\)"),
        ({"shared_share": 0.9}, r"shared_share: 0.9 \(7 of 8 parts\); allowed: fewer parts"),
        ({"shared_share": float("nan")}, "shared_share: nan"),
        ({"method": "magic"}, "method: magic; allowed: one of activation"),
        ({"router": "magic"}, "router: magic; allowed: one of least_squares"),
        ({"window_tokens": 1}, "window: 1; allowed: 2 or more"),
        ({"seed": -1}, "seed: -1; allowed: 0 to 4294967295"),
        ({"seed": 2**32}, "seed: 4294967296; allowed: 0 to 4294967295"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ConvertSettings(**{"experts": 8, "active": 6, **settings})
