"""The training script of the bundled model: a run that was killed goes on as if it had not been."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiny_moe.checkpoint import STATE, CheckpointError, load_state, load_tensors
from tiny_moe.data import Dataset, Stream
from tiny_moe.model import DenseConfig, ModelConfig
from tiny_moe.train import TrainConfig, evaluate, load_best, train

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
)
CONFIG = TrainConfig(steps=4, batch_tokens=2048, warmup_steps=2, eval_every=2)


class KilledAtStep(Dataset):
    """The run dies when it asks for the rows of step 3, one step after its checkpoint."""

    def batch(self, seed: int, step: int, batch_tokens: int, chat_share: float) -> torch.Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return super().batch(seed, step, batch_tokens, chat_share)


@pytest.fixture(scope="module")
def streams() -> dict[str, dict[str, Stream]]:
    generator = torch.Generator().manual_seed(1)

    def stream() -> Stream:
        tokens = torch.randint(MODEL.vocab_size, (3000,), generator=generator)
        return Stream(tokens, torch.arange(0, 3000, 100))

    kinds = ("train", "train_chat", "valid", "valid_chat")
    return {kind: {name: stream() for name in ("a", "b")} for kind in kinds}


@pytest.fixture(scope="module")
def uninterrupted(
    streams: dict[str, dict[str, Stream]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    work_dir = tmp_path_factory.mktemp("uninterrupted")
    run(Dataset(**streams), work_dir)
    return work_dir


@pytest.fixture
def killed(streams: dict[str, dict[str, Stream]], tmp_path: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        run(KilledAtStep(**streams), tmp_path)
    assert load_state(tmp_path)["progress"]["step"] == 2
    return tmp_path


def run(dataset: Dataset, work_dir: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over threads may come in any order
    try:
        train(MODEL, CONFIG, dataset, work_dir)
    finally:
        torch.set_num_threads(threads)


def test_a_resumed_run_equals_an_uninterrupted_one(
    streams: dict[str, dict[str, Stream]], uninterrupted: Path, killed: Path
) -> None:
    torch.manual_seed(99)  # dropout must go on from the saved state of the generator
    run(Dataset(**streams), killed)
    expected, state = load_state(uninterrupted), load_state(killed)
    for progress in (expected["progress"], state["progress"]):
        del progress["elapsed_s"]
    assert state == expected
    for file_name in expected["files"].values():
        ours, theirs = (load_tensors(path, file_name) for path in (killed, uninterrupted))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path.name for path in killed.iterdir()} == {STATE, *state["files"].values()}


def test_the_best_weights_come_with_their_history(
    streams: dict[str, dict[str, Stream]], uninterrupted: Path
) -> None:
    model, progress, config = load_best(uninterrupted)
    assert (model.config, config) == (MODEL, CONFIG)
    means = {evaluation["step"]: evaluation["mean"] for evaluation in progress.evals}
    assert set(means) == {2, 4}
    assert progress.best_step == min(means, key=means.__getitem__)
    again = evaluate(model, Dataset(**streams), max_windows=24)
    assert again["mean"] == pytest.approx(means[progress.best_step], rel=1e-6)


@pytest.mark.parametrize("purpose", ["run", "best"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_a_truncated_tensor_file_is_named(
    streams: dict[str, dict[str, Stream]], killed: Path, purpose: str, keep: float
) -> None:
    path = killed / load_state(killed)["files"][purpose]
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    read = {"run": lambda: run(Dataset(**streams), killed), "best": lambda: load_best(killed)}
    with pytest.raises(CheckpointError, match=rf"{path} cannot be read .* delete {killed}"):
        read[purpose]()


def test_a_truncated_or_missing_json_is_named(
    streams: dict[str, dict[str, Stream]], killed: Path
) -> None:
    path = killed / STATE
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match=f"{path} cannot be read"):
        run(Dataset(**streams), killed)
    path.unlink()
    with pytest.raises(CheckpointError, match="nothing was trained"):
        load_best(killed)


def test_the_numbers_are_plain_json(uninterrupted: Path) -> None:
    state = json.loads((uninterrupted / STATE).read_text())
    assert state["train_config"] == asdict(CONFIG)
    assert state["model_config"] == asdict(MODEL)


def test_a_dense_model_trains_and_stops_when_asked(
    streams: dict[str, dict[str, Stream]], tmp_path: Path
) -> None:
    sizes = {name: value for name, value in asdict(MODEL).items() if "expert" not in name}
    del sizes["moe_intermediate_size"]
    dense = DenseConfig(**sizes, intermediate_size=24)
    asked = iter([False, True])
    config = TrainConfig(steps=4, batch_tokens=2048, warmup_steps=2, eval_every=4)
    train(dense, config, Dataset(**streams), tmp_path, lambda: next(asked))
    assert load_state(tmp_path)["progress"]["step"] == 2
    train(dense, config, Dataset(**streams), tmp_path)
    model, progress, _ = load_best(tmp_path)
    assert (model.config, progress.best_step) == (dense, 4)
