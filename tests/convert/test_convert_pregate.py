"""`--pregate`: it learns from what the written model does, and changes no token while serving."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from dense_models import LAYERS, save_dense
from support.model_runner import Runner
from test_convert import load_converted, prompt, run
from test_resume import KilledError

from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig
from moeserve.convert.calibration import Calibration
from moeserve.convert.pregate import held_back_recall, route
from moeserve.convert.pregate_layers import WrittenModel
from moeserve.core import ConfigError, EngineRequest, Routing, SamplingParams
from moeserve.engine.engine import Engine
from moeserve.models.checkpoint import INDEX_FILE, read_json
from moeserve.models.gates import model_gates
from moeserve.models.pack import pack_model
from moeserve.models.packed_model import config_sha256
from moeserve.models.registry import load_model
from moeserve.predictors import pregate_training
from moeserve.predictors.pregate_file import PREGATE_FILE, load_pregate


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """OUT of a conversion of a random model, with a pregate that was hardly trained."""
    path = tmp_path_factory.mktemp("pregate")
    save_dense(path / "dense", "qwen3", 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pregate_training, "STEPS", 20)
        made = run(path / "dense", path / "out", text, pregate=True)
        run(path / "dense", path / "again", text, pregate=True)
        run(path / "dense", path / "other", text, pregate=True, seed=1)
    assert len(made.pregate_recall) == LAYERS
    assert f"by layer: {made.pregate_recall[0]:.3f}, " in (path / "out" / "README.md").read_text()
    return path / "out"


def test_the_same_command_writes_the_same_file(converted: Path) -> None:
    first, again = (converted.parent / name / PREGATE_FILE for name in ("out", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_killed_while_it_is_written_the_model_is_not_whole(
    converted: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out = converted.parent / "dense", tmp_path / "out"
    monkeypatch.setattr(pregate_training, "STEPS", 20)

    def die(path: Path, *rest: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("moeserve.convert.pregate.write_safetensors", die)
        with pytest.raises(KilledError):
            run(dense, out, text, pregate=True)
    assert not (out / INDEX_FILE).exists()
    with pytest.raises(ConfigError, match="pregate was True, is False"):
        run(dense, out, text)
    run(dense, out, text, pregate=True)
    for file in converted.iterdir():
        if file.name != "README.md":  # says how long it took
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_with_nothing_to_choose(
    converted: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All experts active: every one of them is foreseen."""
    monkeypatch.setattr(pregate_training, "STEPS", 20)
    dense = converted.parent / "dense"
    made = run(dense, tmp_path / "out", text, active=8, pregate=True)
    assert made.pregate_recall == (1.0,) * LAYERS


def test_it_learns_from_what_the_model_routes(converted: Path, seed: int) -> None:
    """Layer by layer from the shards, and all of the model at once."""
    windows = torch.tensor([prompt(seed + n, 48) for n in range(5)])
    text = Calibration.of(windows, windows.numel())
    shards = sorted(converted.glob("model-*.safetensors"))
    config = read_json(converted / "config.json")
    with torch.inference_mode(), WrittenModel.open(converted, config, shards) as written:
        routed = route(written, text, lambda stage, share: None)
    loaded = load_model(ModelConfig(model=str(converted)), ExpertConfig(cpu_backend="torch"))
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(LAYERS)}

    def observe(layer: int, x: torch.Tensor, routing: Routing) -> None:
        found[layer].append(routing.ids)

    loaded.runtime.observers.append(observe)
    for window in [*text.learnt_from, *text.held_back]:
        Runner(loaded).logits(window.tolist())
    gates = model_gates(loaded.model)
    for layer, choices in enumerate(routed.choices):
        ours, theirs = choices.long().sort(1).values, torch.cat(found[layer]).sort(1).values
        assert (ours == theirs).float().mean() > 0.99  # but for scores that are all but equal
        assert torch.equal(routed.gates[layer].weight, gates[layer].weight)
    weights = load_pregate(converted / PREGATE_FILE, config_sha256(converted), gates).weights
    recall = held_back_recall(weights, routed, text)
    assert all(0.3 < share <= 1 for share in recall)


def test_transformers_takes_no_notice(converted: Path) -> None:
    assert load_converted(converted).config.model_type == "glm4_moe"


def answers(packed: Path, prompts: list[list[int]], **settings: object) -> tuple[list, Engine]:
    config = EngineConfig(
        model=ModelConfig(model=str(packed)),
        kv=KvConfig(kv_bytes=1 << 20),
        experts=ExpertConfig(cpu_backend="native", num_threads=1, **settings),
    )
    engine = Engine.from_config(config)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    for number, tokens in enumerate(prompts):
        engine.add(EngineRequest(request_id=str(number), token_ids=tokens, params=params))
    told: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    while engine.has_work:
        for delta in engine.step():
            told[delta.request_id] += delta.token_ids
    engine.check_integrity()
    return list(told.values()), engine


def test_the_tokens_do_not_depend_on_it(converted: Path, seed: int) -> None:
    packed = converted.parent / "packed"
    pack_model(ModelConfig(model=str(converted), quantize="int8"), packed)
    prompts = [prompt(seed, 20), prompt(seed + 1, 7)]
    expected, resident = answers(packed, prompts)
    resident.loaded.close()
    for depth in (1, LAYERS):
        told, engine = answers(
            packed, prompts, host_slots=9, predictor="pregate", prefetch_depth=depth
        )
        assert told == expected
        (cache,) = engine.stats(fresh=True).experts.caches
        assert cache.prefetches_begun[0] > 0, "the first layer's, before the step"
        assert "pregate" in engine.info.notes["predictor"]
        engine.loaded.close()


def test_without_the_file_or_with_anothers_it_is_refused(converted: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    pack_model(ModelConfig(model=str(converted), quantize="int8"), packed)
    other = converted.parent / "other" / PREGATE_FILE
    with pytest.raises(ConfigError, match="was trained for another model"):
        answers(packed, [], host_slots=9, predictor="pregate", predictor_file=other)
    shutil.move(packed / PREGATE_FILE, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"there is no .*convert with --pregate"):
        answers(packed, [], host_slots=9, predictor="pregate")
    told, engine = answers(
        packed, [[5, 6]], host_slots=9, predictor="pregate", predictor_file=tmp_path / "elsewhere"
    )
    engine.loaded.close()
    assert len(told[0]) == 12
