"""`moeserve eval ppl` against transformers, for a Mixture-of-Experts and a dense model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moeserve.cli import main
from moeserve.config import BUNDLED_MODEL
from moeserve.text.tokenizer import Tokenizer

TEXT = "Once upon a time, there was a little dog. He played.\n\nKING RICHARD:\nMy lord!\n" * 8
WINDOW = 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def expected(path: Path) -> tuple[float, int]:
    ids = torch.tensor(Tokenizer.load(path).encode(TEXT))
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    return float(loss.exp()), windows[:, 1:].numel()


def command(path: Path, text: Path, *more: str) -> list[str]:
    return ["eval", "ppl", str(path), "--text", str(text), "--window", str(WINDOW), *more]


def test_the_bundled_model(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(BUNDLED_MODEL, text, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    perplexity, num_tokens = expected(Path(BUNDLED_MODEL))
    assert found["num_tokens"] == num_tokens
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_a_dense_model(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundled = Path(BUNDLED_MODEL)
    for file in bundled.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3072, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert main(command(tmp_path, text)) == 0
    perplexity, num_tokens = expected(tmp_path)
    said = capsys.readouterr().out
    assert f"{num_tokens} tokens in windows of {WINDOW}" in said
    assert float(said.split()[1]) == pytest.approx(perplexity, rel=1e-4)


def test_what_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "ppl", "--text", str(text), "--window", "1"]) == 2
    assert "window: 1 is below the minimum 2" in capsys.readouterr().err
    assert main(command(BUNDLED_MODEL, text, "--tokens", "10")) == 2
    assert "tokens: 10 is less than one window of 40" in capsys.readouterr().err
    assert main(command(BUNDLED_MODEL, tmp_path / "none.txt")) == 2
    assert "none.txt cannot be read" in capsys.readouterr().err
