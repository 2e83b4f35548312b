"""`moeserve predictors train` and `eval` on the bundled model and this file's own kind of text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moeserve import cli
from moeserve.config import BUNDLED_MODEL, ExpertConfig, ModelConfig
from moeserve.core import ConfigError
from moeserve.models.registry import LoadedModel
from moeserve.predictor_tools.model_runs import loaded_model
from moeserve.predictor_tools.training import TrainingPlan, train_residual
from moeserve.predictors.residual_weights import ResidualShape
from moeserve.text.tokenizer import Tokenizer
from moeserve.text_windows import read_texts, token_windows

TEXT = Path(__file__)
SHAPE = ResidualShape(depth=2, expert_rank=2, context_rank=2)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    config = ExpertConfig(cpu_backend="native", num_threads=1)
    with loaded_model(ModelConfig(), config, lambda stage, share: None) as model:
        yield model


def windows_of(loaded: LoadedModel, window: int, tokens: int) -> torch.Tensor:
    tokenizer = Tokenizer.load(loaded.path)
    return token_windows(tokenizer, read_texts([TEXT] * 3), 1, window, tokens)


def stop_at(stage: str, share: float) -> Callable[[str, float], None]:
    def progress(now: str, done: float) -> None:
        if now == stage and done >= share:
            raise Killed

    return progress


def test_a_killed_run_goes_on_and_ends_the_same(loaded: LoadedModel, tmp_path: Path) -> None:
    plan = TrainingPlan(windows_of(loaded, 1024, 5120), SHAPE, epochs=1)
    whole = train_residual(loaded, plan, tmp_path / "whole", lambda stage, share: None)
    whole.save(tmp_path / "whole.safetensors")
    work = tmp_path / "work"
    for stage, share in (("running the text", 0.1), ("layer 0", 0.5), ("layer 2", 0.0)):
        with pytest.raises(Killed):
            train_residual(loaded, plan, work, stop_at(stage, share))
        if stage == "running the text":  # rows that were being written do not count
            with (work / "0.states").open("ab") as file:
                file.write(b"torn")
    assert not loaded.runtime.observers
    stages: set[str] = set()
    trained = train_residual(loaded, plan, work, lambda stage, share: stages.add(stage))
    assert stages == {"layer 2", "layer 3", "layer 4"}
    trained.save(tmp_path / "again.safetensors")
    first, second = (tmp_path / f"{n}.safetensors" for n in ("whole", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_another_plan_takes_nothing_of_an_earlier_one(loaded: LoadedModel, tmp_path: Path) -> None:
    plan = TrainingPlan(windows_of(loaded, 256, 512), SHAPE, epochs=1)
    train_residual(loaded, plan, tmp_path, lambda stage, share: None)
    stages: set[str] = set()
    other = TrainingPlan(windows_of(loaded, 128, 512), SHAPE, epochs=1)
    train_residual(loaded, other, tmp_path, lambda stage, share: stages.add(stage))
    assert stages == {"running the text", *(f"layer {n}" for n in range(5))}


def run(*words: object) -> int:
    return cli.main([*map(str, words), "--cpu-backend", "native", "--num-threads", "1"])


def test_train_then_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "predictors.safetensors", tmp_path / "recall.png"
    small = ("--expert-rank", 2, "--context-rank", 2, "--epochs", 1)
    text = ("--text", TEXT, "--window", 48, "--tokens", 192)
    assert run("predictors", "train", BUNDLED_MODEL, *text, *small, "-o", out) == 0
    assert out.exists()
    assert not out.with_name(out.name + ".work").exists()
    capsys.readouterr()
    flags = ("--file", out, "--json", "--plot", plot, "--depth", 2)
    assert run("predictors", "eval", BUNDLED_MODEL, *text, *flags) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    names = [each["name"] for each in report["predictors"]]
    assert names == ["frequency", "markov", "gate_lookahead", "gate_residual"]
    for each in report["predictors"]:
        assert [mean["distance"] for mean in each["mean"]] == [1, 2]
        assert all(0 < mean["recall_k"] <= mean["recall_k_plus_2"] <= 1 for mean in each["mean"])
        assert {cost["rows"] for cost in each["costs"]} == {1, 16}
    of = {each["name"]: each["mean"][0]["recall_k"] for each in report["predictors"]}
    assert of["gate_lookahead"] > 0.6
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("eval", "--text", "no/such/file"), "no/such/file"),
        (("eval", "--text", TEXT, "--window", 1, "--tokens", 10), "window"),
        (("eval", "--text", TEXT, "--streams", 500, "--no-cost"), "streams"),
        (("eval", "--text", TEXT, "--threshold", 1.5), "threshold"),
        (("eval", "--text", TEXT, "--plot", "x.gif"), "gif"),
        (("eval", "--text", TEXT, "--predictor", "gate_residual", "--file", "none.st"), "none"),
        (("train", "--text", TEXT, "--expert-rank", 0), "expert_rank"),
        (("train", "--text", TEXT, "--tokens", 0), "tokens"),
        (("train", "--text", TEXT, "--epochs", 0), "epochs"),
    ],
)
def test_wrong_input_is_named(
    flags: tuple[object, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predictors", *flags) == 2
    assert says in capsys.readouterr().err


def test_texts(tmp_path: Path, loaded: LoadedModel) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert read_texts([tmp_path]) == ["first", "second"]
    with pytest.raises(ConfigError, match=r"c\.bin"):
        read_texts([tmp_path / "c.bin"])
    tokenizer = Tokenizer.load(loaded.path)
    texts = ["Once upon a time", "there was a dog"]
    tokens = [*tokenizer.encode(texts[0]), 1, *tokenizer.encode(texts[1]), 1]
    windows = token_windows(tokenizer, texts, 1, 3, None)
    assert windows.flatten().tolist() == tokens[: len(tokens) // 3 * 3]
    thinned = token_windows(tokenizer, texts * 20, 1, 3, 12)
    assert len(thinned) == 4
    with pytest.raises(ConfigError, match="window"):
        token_windows(tokenizer, texts, 1, 1000, None)
