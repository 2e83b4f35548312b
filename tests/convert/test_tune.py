"""Tuning: nearer to the dense model, the same bits after a kill, equal logits in transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import LAYERS, save_dense
from support.model_runner import Runner, load_native
from support.settled import relative_error
from test_convert import check_agreement, load_converted, prompt, run
from test_resume import KilledError, files
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeserve.config import ModelConfig
from moeserve.convert import shards, tune, tune_ffn
from moeserve.convert.calibration import Calibration
from moeserve.convert.convert import Conversion
from moeserve.convert.dense import open_dense
from moeserve.convert.settings import ConvertSettings
from moeserve.convert.tune import TuningText
from moeserve.convert.tune_model import TunedModel
from moeserve.convert.tune_plot import PICTURE
from moeserve.core import ConfigError
from moeserve.text.tokenizer import Tokenizer

STEPS = 6


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "STEP_TOKENS", 512)
    monkeypatch.setattr(tune, "CHECK_TOKENS", 512)


@pytest.fixture(scope="session")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words, enough of them to tune on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words(2, 2500)))
    return path


def words(seed: int, count: int) -> list[str]:
    """Of thirty that are always the same."""
    rng = random.Random(1)
    known = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(30)]
    return random.Random(seed).choices(known, k=count)


@pytest.fixture
def dense(tmp_path: Path, seed: int) -> Path:
    family = random.Random(seed).choice(["llama", "qwen2", "qwen3"])
    save_dense(tmp_path / "dense", family, seed)
    return tmp_path / "dense"


def tune_for(dense: Path, out: Path, text: Path, steps: int = STEPS, **more: Any) -> Conversion:
    return run(dense, out, text, active=4, tune_steps=steps, **more)


def test_the_tuned_model_is_nearer_to_the_dense_one(
    dense: Path, tmp_path: Path, long_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers, on text that nothing was fitted to."""
    monkeypatch.setattr(tune, "WARM_UP_STEPS", 1)
    run(dense, tmp_path / "plain", long_text, active=4)
    made = tune_for(dense, tmp_path / "tuned", long_text, steps=30)
    ids = Tokenizer.load(dense).encode(" ".join(words(3, 400)))
    tokens = torch.tensor(ids[: 20 * 48]).view(20, 48)
    teacher = AutoModelForCausalLM.from_pretrained(dense).eval()
    plain, tuned = load_converted(tmp_path / "plain"), load_converted(tmp_path / "tuned")
    before, after = (divergence(teacher, model, tokens) for model in (plain, tuned))
    assert after < 0.95 * before
    assert made.tuning is not None
    assert made.tuning.divergences[1] < 0.95 * made.tuning.divergences[0]
    assert made.tuning.num_steps == 30
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert f"![divergence over steps]({PICTURE})" in card
    assert "active a tuned model is *not* the dense one" in card
    assert (tmp_path / "tuned" / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_tuning_that_does_harm_is_not_written(
    dense: Path, tmp_path: Path, long_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rate that ruins any model, what was best is the untuned one."""
    monkeypatch.setattr(tune, "RATE", 3.0)
    monkeypatch.setattr(tune, "WARM_UP_STEPS", 1)
    plain = run(dense, tmp_path / "plain", long_text, active=4)
    made = tune_for(dense, tmp_path / "tuned", long_text)
    assert made.tuning is not None
    assert (made.tuning.best_step, made.tuning.num_steps) == (0, STEPS)
    assert made.tuning.divergences[0] == made.tuning.divergences[1]
    # A router is written in other units of its scores, which may turn a choice on the edge.
    assert made.quality.perplexity == pytest.approx(plain.quality.perplexity, rel=1e-3)


def test_the_best_of_all_checks_is_written(
    dense: Path, tmp_path: Path, long_text: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the checks say: the weights are those of the check that says least."""
    told = random.Random(seed).sample(range(1, 100), STEPS + 1)
    best = told.index(min(told))
    seen: list[dict[str, Tensor]] = []
    check, take = tune.Tuner._check, tune.Tuner.take_best

    def tell(self: tune.Tuner) -> None:
        seen.append({name: tensor.clone() for name, tensor in self._mean.items()})
        with monkeypatch.context() as patch:
            patch.setattr(self.model, "divergence", lambda *_: (float(told[len(seen) - 1]), None))
            check(self)

    def compare(self: tune.Tuner) -> None:
        take(self)
        for name, parameter in self.model.parameters().items():
            assert torch.equal(parameter, seen[best][name]), name

    monkeypatch.setattr(tune.Tuner, "_check", tell)
    monkeypatch.setattr(tune.Tuner, "take_best", compare)
    made = tune_for(dense, tmp_path / "tuned", long_text)
    assert made.tuning is not None
    assert made.tuning.best_step == best
    assert made.tuning.divergences == (told[0], min(told))
    changed = [not torch.equal(seen[0][name], seen[-1][name]) for name in seen[0]]
    assert all(changed)


def divergence(teacher: Any, student: Any, tokens: Tensor) -> float:
    with torch.inference_mode():
        wanted, found = (model(tokens).logits.double().log_softmax(-1) for model in
                         (teacher, student))  # fmt: skip
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 2), (torch.bfloat16, 16)])
def test_transformers_and_moeserve_agree_on_a_tuned_model(
    dtype: torch.dtype,
    rank: int,
    tmp_path: Path,
    long_text: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With corrections of two factors, and of one matrix."""
    monkeypatch.setattr(tune_ffn, "RANK", rank)
    save_dense(tmp_path / "dense", "qwen3", seed, dtype)
    made = tune_for(tmp_path / "dense", tmp_path / "out", long_text, shared_share=None)
    reference = load_converted(tmp_path / "out").float()
    runner = Runner(load_native(tmp_path / "out", dtype="float32"))
    check_agreement(reference, runner, seed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "glm4_moe"
    assert made.tuning is not None
    assert 0 < made.quality.agreement <= 1


def test_what_is_tuned_is_what_was_written(dense: Path, tmp_path: Path, long_text: Path) -> None:
    """Before the first step: the dense model exactly, and the written one in transformers but for
    the weights of chosen experts, which are one here. That may turn a choice on the edge, in few
    rows."""
    made = run(dense, tmp_path / "out", long_text, active=4)
    tokens = torch.tensor([prompt(1, 48), prompt(2, 48)])
    with open_dense(ModelConfig(model=str(dense))) as model, torch.no_grad():
        shape = made.shape
        paths = [
            tmp_path / "out" / f"model-{n + 1:05}-of-{LAYERS + 1:05}.safetensors"
            for n in range(LAYERS)
        ]
        own = TunedModel(model, shape, paths, [0] * LAYERS, 48, 0)
        stream, _, _ = own.tuned(tokens)
        found = own._log_probabilities(stream)
        found_dense = own._log_probabilities(own.dense(tokens))
        teacher = AutoModelForCausalLM.from_pretrained(dense).eval()
        expected_dense = teacher(tokens).logits.log_softmax(-1)
        expected = load_converted(tmp_path / "out")(tokens).logits.log_softmax(-1)
    assert relative_error(found_dense, expected_dense) < 1e-4
    errors = (found - expected).flatten(0, 1).norm(dim=1) / expected.flatten(0, 1).norm(dim=1)
    assert errors.median() < 0.02
    assert relative_error(expected, expected_dense) > 0.1, "nothing is left out"


def test_killed_at_any_file_tuning_goes_on(
    dense: Path, tmp_path: Path, long_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "SAVE_S", 0.0)
    sync = shards.os.fsync
    left = 0

    def die(handle: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KilledError
        sync(handle)

    monkeypatch.setattr(shards.os, "fsync", die)
    tune_for(dense, tmp_path / "whole", long_text, steps=2)
    expected, written = files(tmp_path / "whole"), -left
    # Each layer has a shard and a state before; what comes after them is new here.
    for number in random.sample(range(2 * LAYERS + 3, written + 1), 3):
        out = tmp_path / f"cut-{number}"
        left = number
        with pytest.raises(KilledError):
            tune_for(dense, out, long_text, steps=2)
        left = 0
        tune_for(dense, out, long_text, steps=2)
        assert files(out) == expected, f"cut at file {number}"


def test_killed_while_shards_take_their_places(
    dense: Path, tmp_path: Path, long_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_for(dense, tmp_path / "whole", long_text, steps=2)
    replace = Path.replace

    def die(path: Path, target: Path) -> Path:
        if path.parent != target.parent and path.name.startswith("model-00002"):
            raise KilledError
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KilledError):
            tune_for(dense, tmp_path / "cut", long_text, steps=2)
    tune_for(dense, tmp_path / "cut", long_text, steps=2)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_minutes_count_over_all_runs(
    dense: Path, tmp_path: Path, long_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after its last step was saved, a run has no minutes left and makes no other one."""

    def die(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("moeserve.convert.tune_run.draw_history", die)
        with pytest.raises(KilledError):
            run(dense, tmp_path / "out", long_text, tune_minutes=0.01)
    with monkeypatch.context() as patch:
        patch.setattr("moeserve.convert.tune.Tuner._step", die)
        made = run(dense, tmp_path / "out", long_text, tune_minutes=0.01)
    assert made.tuning is not None
    assert made.tuning.seconds >= 0.6
    assert made.tuning.num_steps >= 1


def test_other_settings_do_not_go_on(
    dense: Path, tmp_path: Path, long_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("moeserve.convert.tune.Tuner.run", die)
        with pytest.raises(KilledError):
            tune_for(dense, tmp_path / "out", long_text)
    match = "unfinished conversion of another kind: tune_steps was 6, is 7"
    with pytest.raises(ConfigError, match=match):
        tune_for(dense, tmp_path / "out", long_text, steps=7)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tune_minutes": 0.0}, "tune_minutes: 0.0; allowed: above 0"),
        ({"tune_minutes": -1.0}, "tune_minutes: -1.0; allowed: above 0"),
        ({"tune_minutes": float("nan")}, "tune_minutes: nan; allowed: above 0"),
        ({"tune_minutes": float("inf")}, "tune_minutes: inf; allowed: above 0, finite"),
        ({"tune_steps": 0}, "tune_steps: 0; allowed: 1 or more"),
        ({"tune_minutes": 1.0, "tune_steps": 5}, "tune_steps: 5; allowed: only without"),
        ({"tune_minutes": 1.0, "active": 8}, "active: 8; allowed: fewer than experts"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ConvertSettings(**{"experts": 8, "active": 6, **settings})


def test_too_little_text(dense: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(" ".join(words(4, 200)))
    with pytest.raises(ConfigError, match=r"text: \d+ tokens to tune on; 4096 or more .*more text"):
        tune_for(dense, tmp_path / "out", short)
    assert not (tmp_path / "out").exists()


def test_nothing_kept_back_is_tuned_on(seed: int) -> None:
    """Nor what the best step is chosen by; every other window once before any comes again."""
    rng = random.Random(seed)
    count, length = rng.randint(130, 200), 128
    windows = torch.arange(count * length).view(count, length)
    text = Calibration.of(windows, rng.randint(20, count) * length)
    own = TuningText.of(text)
    kinds = [text.held_back, own.chosen_by, own.learnt_from]
    assert all(len(kind) for kind in kinds)
    assert sorted(torch.cat(kinds).flatten().tolist()) == windows.flatten().tolist()
    learnt = own.learnt_from[:, 0].tolist()
    steps = -(-2 * len(learnt) // own.windows_per_step)
    seen = torch.cat([own.batch(seed, step)[:, 0] for step in range(steps)]).tolist()
    for turn in range(2):
        assert sorted(seen[turn * len(learnt) : (turn + 1) * len(learnt)]) == learnt
    assert seen[: len(learnt)] != seen[len(learnt) : 2 * len(learnt)]
