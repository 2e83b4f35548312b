"""What runs with slots on a GPU, by torch on the CPU: fresh models, settings and requests."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from support.engine_answers import answers, make_engine, make_requests
from support.randomness import fresh_seed

# The families' models are those of the parity tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

from support.device_tier_checks import (
    DENSE,
    MOE_FAMILIES,
    PREDICTORS,
    check_engine,
    check_family,
    supply_of,
)

from moeserve.cache.types import Load
from moeserve.config import BUNDLED_MODEL, EngineConfig, ExpertConfig, ModelConfig
from moeserve.core import ConfigError, ExpertKey, Routing
from moeserve.engine.engine import Engine
from moeserve.experts.device.torch_device import TorchDevice
from moeserve.experts.device.torch_link import HostRecords
from moeserve.models.pack import pack_model
from moeserve.models.registry import load_model


@pytest.mark.parametrize("model_type", MOE_FAMILIES)
def test_families_are_transformers(model_type: str, tmp_path: Path) -> None:
    check_family(model_type, "dry-run", random.Random(fresh_seed()), tmp_path)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"device_slots: .* has no experts that could stand"):
        check_family(DENSE[0], "dry-run", random.Random(fresh_seed()), tmp_path)


@pytest.fixture(scope="module", params=["none", "int8", "int4"])
def floats(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, packed to compute in float32 on either side."""
    config = ModelConfig(
        model=str(BUNDLED_MODEL),
        dtype="float32",
        quantize=request.param,
        quantize_activations=None if request.param == "none" else False,
    )
    return pack_model(config, tmp_path_factory.mktemp("floats") / "tiny").path


def test_a_checkpoint_says_what_the_cpu_says() -> None:
    check_engine("dry-run", random.Random(fresh_seed()), BUNDLED_MODEL)


def test_a_packed_model_says_what_the_cpu_says(floats: Path) -> None:
    check_engine("dry-run", random.Random(fresh_seed()), floats)


def test_three_tiers_say_what_the_cpu_says(floats: Path) -> None:
    rng = random.Random(fresh_seed())
    for host_slots in (2, rng.randint(3, 40)):
        check_engine("dry-run", rng, floats, host_slots=host_slots)


def test_a_budget_of_host_memory_is_for_experts_alone(floats: Path) -> None:
    """Kv and the weights of every token are on the device: a limit that would be too small for them
    holds as many experts as it has room for, while kv comes and goes."""
    rng = random.Random(fresh_seed())
    probe = make_engine(floats, host_slots=2)
    slot_bytes = probe.loaded.runtime.host_slot_bytes
    probe.close()
    assert slot_bytes is not None
    host_slots = rng.randint(2, 40)
    check_engine("dry-run", rng, floats, host_memory_bytes=host_slots * slot_bytes)
    engine = make_engine(
        floats, device="dry-run", device_slots=3, host_memory_bytes=host_slots * slot_bytes
    )
    disk = engine.loaded.runtime.disk
    assert disk is not None
    assert disk.cache.num_slots == host_slots
    memory = engine.stats().memory
    assert memory is not None
    assert memory.kv_bytes == memory.kv_limit_bytes == memory.weights_bytes == 0
    engine.close()


def test_a_copy_that_fails_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not waited for without an end."""
    engine = make_engine(BUNDLED_MODEL, device="dry-run", device_slots=96)
    device = supply_of(engine.loaded).device
    assert isinstance(device, TorchDevice)

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(HostRecords, "_copy", broken)
    load = Load(ExpertKey(engine.loaded.runtime.cache.numbers.layers[0], 0), 0)
    device.demand([load])
    with pytest.raises(RuntimeError, match="a copy to cpu has failed: CUDA error"):
        device.wait_for_copy()
    engine.close()


@pytest.mark.parametrize("name", PREDICTORS)
def test_hidden_states_are_brought_to_predictors_that_read_them(name: str) -> None:
    engine = make_engine(BUNDLED_MODEL, device="dry-run", device_slots=5, predictor=name)
    predictor = engine.loaded.runtime.predictor
    asked: list[str] = []

    class Rows(torch.Tensor):
        def cpu(self, *args: object, **kwargs: object) -> torch.Tensor:
            asked.append(name)
            return self.as_subclass(torch.Tensor)

    layer = engine.loaded.runtime.cache.numbers.layers[0]
    ffn = engine.loaded.spec.moe_layers[layer]
    x = torch.zeros(1, ffn.experts.hidden_size)
    routing = Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    predictor.predict(layer, x.as_subclass(Rows), routing)
    assert bool(asked) == name.startswith("gate")
    engine.close()


def test_bfloat16_is_near(tmp_path: Path) -> None:
    """Both sides round, each in its own places; first tokens have the prompt alone behind them."""
    rng = random.Random(fresh_seed())
    half = ModelConfig(model=str(BUNDLED_MODEL), dtype="bfloat16", quantize="int4")
    for path in (BUNDLED_MODEL, pack_model(half, tmp_path / "half").path):
        dtype = "bfloat16" if path == BUNDLED_MODEL else "auto"
        plain = make_engine(path, dtype=dtype)
        requests = make_requests(rng, plain.info.vocab_size)
        expected = answers(plain, requests)
        plain.close()
        slots = rng.randint(1, 60)
        engine = make_engine(path, device="dry-run", dtype=dtype, device_slots=slots)
        assert engine.info.dtype == "bfloat16"
        found = answers(engine, requests)
        engine.close()
        off = [
            abs(found[name][0][1] - tokens[0][1])
            for name, tokens in expected.items()
            if found[name][0][0] == tokens[0][0]
        ]
        assert len(off) >= 3
        assert max(off) < 0.5


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_experts_stand_there_as_they_are(quantize: str) -> None:
    config = EngineConfig(
        model=ModelConfig(model=str(BUNDLED_MODEL), device="dry-run", quantize=quantize),
        experts=ExpertConfig(device_slots=5),
    )
    engine = Engine.from_config(config)
    device = supply_of(engine.loaded).device
    assert quantize in engine.info.notes["weights"]
    assert device.slots.slot_bytes == max(
        costs.expert_bytes for costs in map(device.costs, engine.loaded.spec.moe_layers)
    )
    assert "5 of " in engine.info.notes["device_experts"]
    engine.close()


def test_what_makes_no_sense_is_refused(packed: Path) -> None:
    with pytest.raises(ConfigError, match="dry-run: how many experts have room there"):
        make_engine(packed, device="dry-run")
    with pytest.raises(ConfigError, match="device_slots: it is for a device beside the CPU"):
        make_engine(packed, device_slots=3)
    with pytest.raises(ConfigError, match="emulate_cpu: it is for an emulated device"):
        make_engine(packed, device="dry-run", device_slots=3, emulate_cpu=True)
    with pytest.raises(ConfigError, match="device_memory: 1 bytes hold no expert"):
        make_engine(packed, device="dry-run", device_memory_bytes=1)
    with pytest.raises(ConfigError, match="dry-run: how many experts have room there"):
        load_model(ModelConfig(model=str(packed), device="dry-run"), ExpertConfig())
    with pytest.raises(ConfigError, match="workers: they are for --device cpu"):
        make_engine(packed, device="dry-run", device_slots=3, workers=("ipc:///nowhere",))
