"""Recorded routing against the routers of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moeserve import cli
from moeserve.config import BUNDLED_MODEL
from moeserve.models.packed_model import config_sha256
from moeserve.text.tokenizer import Tokenizer


def run(*words: object) -> int:
    flags = ("--cpu-backend", "native", "--num-threads", "1")
    return cli.main(["trace", *map(str, words), *flags])


def reference_logits(tokens: list[int]) -> np.ndarray:  # type: ignore[type-arg]
    """[T, L, E] router logits by transformers."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    with torch.inference_mode():
        output = model(torch.tensor([tokens]), output_router_logits=True)
    return torch.stack(output.router_logits, dim=1).numpy()


def check(trace: dict[str, np.ndarray], first: int, tokens: list[int]) -> None:  # type: ignore[type-arg]
    """The tokens stand at `first` of the trace."""
    rows = slice(first, first + len(tokens))
    assert trace["tokens"][rows].tolist() == tokens
    logits = reference_logits(tokens).astype(np.float64)
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    ids, probs = trace["ids"][rows], trace["probs"][rows].astype(np.float64)
    best = np.sort(chances, axis=-1)[..., ::-1][..., : ids.shape[-1]]
    expected = best / best.sum(-1, keepdims=True)
    np.testing.assert_allclose(probs, expected, atol=2e-3)
    chosen = np.take_along_axis(chances, ids.astype(np.int64), -1)
    np.testing.assert_allclose(chosen, best, rtol=1e-2)  # the same experts, but for ties
    assert (np.diff(probs, axis=-1) <= 0).all()


def test_of_a_text(tmp_path: Path) -> None:
    out = tmp_path / "routing.npz"
    assert run("--text", __file__, "--window", 96, "--tokens", 288, "-o", out) == 0
    trace = dict(np.load(out))
    assert trace["ids"].shape == (288, 6, 4)
    assert trace["ids"].dtype == np.uint8
    assert trace["probs"].dtype == np.float16
    assert trace["lens"].tolist() == [96, 96, 96]
    assert trace["layers"].tolist() == list(range(6))
    about = json.loads(str(trace["about"]))
    assert about["config_sha256"] == config_sha256(BUNDLED_MODEL)
    for first in (0, 96):
        check(trace, first, trace["tokens"][first : first + 96].tolist())


def test_of_answers(tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "routing.npz"
    prompts.write_text("Once upon a time\n\nROMEO:\n")
    assert run("--prompts", prompts, "--max-tokens", 12, "-o", out) == 0
    trace = dict(np.load(out))
    tokenizer = Tokenizer.load(BUNDLED_MODEL)
    first = 0
    for prompt, length in zip(("Once upon a time", "ROMEO:"), trace["lens"], strict=True):
        tokens = trace["tokens"][first : first + length].tolist()
        known = tokenizer.encode(prompt)
        assert tokens[: len(known)] == known
        assert len(tokens) == len(known) + 11  # the last one chosen goes through no layer
        check(trace, first, tokens)
        first += int(length)
    assert first == len(trace["tokens"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--text", __file__, "-o", "no/such/dir/x.npz"), "no/such/dir"),
        (("--prompts", "no/such/file", "-o", "x.npz"), "no/such/file"),
        (("--text", __file__, "--tokens", 0, "-o", "x.npz"), "tokens"),
        (("--prompts", __file__, "--max-tokens", -1, "-o", "x.npz"), "max_tokens"),
    ],
)
def test_wrong_input_is_named(
    flags: tuple[object, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags) == 2
    assert says in capsys.readouterr().err
