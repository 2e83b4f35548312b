"""Sizes from config.json, against transformers' models and against files that are packed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.known_configs import MIXTRAL_8X7B
from transformers import AutoConfig, AutoModelForCausalLM

from moeserve.cache.expert_cache import Tier
from moeserve.config import (
    BUNDLED_MODEL,
    EngineConfig,
    ExpertConfig,
    KvConfig,
    ModelConfig,
    SchedulerConfig,
)
from moeserve.core import ConfigError, ModelError
from moeserve.engine.kv_limit import num_kv_blocks
from moeserve.engine.kv_sizes import kv_sizes
from moeserve.experts.schedule.profile_file import shipped_profile
from moeserve.models.families import FAMILIES
from moeserve.models.kv_pool import KvPool
from moeserve.models.packed_model import PAGE_BYTES
from moeserve.planner.deployment import sized
from moeserve.planner.lookup import find_shape
from moeserve.planner.memory import slot_bytes
from moeserve.planner.model_shape import read_shape
from moeserve.planner.plan_types import PlanRequest, Traffic
from moeserve.planner.random_model import write_random_packed
from moeserve.planner.simulate.system import simulate

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
#: what a family's experts need besides
MORE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
    | {"v_head_dim": 16, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
    | {"v_head_dim": 16, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "num_nextn_predict_layers": 0},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "llama": {},
    "mistral": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    | {"shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16}
    | {"num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16, "n_group": 1}
    | {"topk_group": 1, "num_nextn_predict_layers": 0},
}


def write(path: Path, raw: dict[str, Any]) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps(raw))
    return file


def test_every_family_is_sized_here() -> None:
    assert MORE.keys() == FAMILIES.keys()


@pytest.mark.parametrize("model_type", sorted(MORE))
def test_parameters_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    tied = random.random() < 0.5
    config = AutoConfig.for_model(
        model_type, **{**SMALL, "tie_word_embeddings": tied, **MORE[model_type]}
    )
    model = AutoModelForCausalLM.from_config(config)
    raw = config.to_dict() | {"torch_dtype": "bfloat16", "dtype": None}
    shape = read_shape(ModelConfig(), write(tmp_path, raw))
    # transformers keeps inverse frequencies and such as buffers, which are no parameters.
    buffers = sum(b.numel() for name, b in model.named_buffers() if "correction_bias" in name)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters()) + buffers
    assert shape.dtype == "bfloat16"
    weights = sum(matrix.rows * matrix.cols for layer in shape.layers for matrix in layer.products)
    assert 0 < weights < shape.num_parameters
    ups = [matrix.name for matrix in shape.layers[-1].products if matrix.per_head]
    assert ups == (["key_up", "value_up"] if model_type.startswith("deepseek") else [])


@pytest.mark.parametrize("model_type", sorted(MORE))
def test_every_family_is_planned(model_type: str, tmp_path: Path) -> None:
    """With biases where a family may have them, in a random format and number of threads."""
    rng = random.Random()
    config = AutoConfig.for_model(model_type, **SMALL | MORE[model_type])
    raw = config.to_dict() | {"torch_dtype": "bfloat16", "dtype": None}
    if "attention_bias" in raw:
        raw["attention_bias"] = True
    settings = EngineConfig(
        model=ModelConfig(
            model=str(write(tmp_path, raw)), quantize=rng.choice(["none", "int8", "int4"])
        ),
        kv=KvConfig(num_blocks=64),
        experts=ExpertConfig(num_threads=rng.randint(1, 4)),
    )
    request = PlanRequest(
        engine=settings, traffic=Traffic(concurrency=3, prompt_tokens=40, output_tokens=5)
    )
    deployment = sized(request, shipped_profile("rtx4090-pcie4"), find_shape(settings))
    weights = deployment.shape.rest_bytes + deployment.shape.expert_bytes
    assert deployment.memory.steady_bytes(Tier.HOST) > weights
    estimate = simulate(deployment)
    assert estimate.output_tokens_per_s.mid > 0


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_sizes_are_those_of_what_is_packed(model_type: str, quantize: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(model_type, **SMALL | MORE[model_type])
    file = write(tmp_path, config.to_dict() | {"torch_dtype": "bfloat16", "dtype": None})
    write_random_packed(file, tmp_path / "packed", quantize)
    wanted = ModelConfig(quantize=quantize)
    planned = read_shape(wanted, file)
    packed = read_shape(ModelConfig(), tmp_path / "packed")
    assert packed.packed
    assert not planned.packed
    for of in ("rest_bytes", "expert_bytes", "kv_token_bytes", "num_parameters", "layers", "head"):
        assert getattr(planned, of) == getattr(packed, of), of
    on_disk = sum(each.stat().st_size for each in (tmp_path / "packed").glob("*.safetensors"))
    # Matrices stand on whole pages there, and files have a header.
    spare = on_disk - planned.rest_bytes - planned.expert_bytes
    matrices = sum(len(layer.products) for layer in planned.layers) + 1
    assert 0 <= spare <= PAGE_BYTES * (matrices + 8)


def test_mixtral_8x7b_from_its_config_alone(tmp_path: Path) -> None:
    shape = read_shape(ModelConfig(), write(tmp_path, MIXTRAL_8X7B))
    assert shape.num_parameters == 46_702_792_704  # as its model card counts them
    assert shape.kv_token_bytes == 2 * 32 * 8 * 128 * 2
    expert = 3 * 4096 * 14336 * 2
    assert shape.layers[0].experts is not None
    assert shape.layers[0].experts.record_bytes == expert
    assert shape.expert_bytes == 32 * 8 * expert


def test_codes_of_published_checkpoints_are_kept(tmp_path: Path) -> None:
    gpt_oss = AutoConfig.for_model("gpt_oss", **SMALL | MORE["gpt_oss"]).to_dict()
    gpt_oss |= {"torch_dtype": "bfloat16", "dtype": None}
    plain = read_shape(ModelConfig(), write(tmp_path, gpt_oss))
    stored = gpt_oss | {"quantization_config": {"quant_method": "mxfp4"}}
    codes = read_shape(ModelConfig(), write(tmp_path, stored))
    assert plain.layers[0].experts is not None
    assert codes.layers[0].experts is not None
    assert plain.layers[0].experts.form == "bfloat16"
    assert codes.layers[0].experts.form.startswith("mxfp4")
    assert codes.expert_bytes < plain.expert_bytes
    assert codes.rest_bytes == plain.rest_bytes


def test_kv_pool_is_sized_as_the_engine_does(tmp_path: Path) -> None:
    rng = random.Random(seed := random.randrange(1 << 30))
    file = write(tmp_path, MIXTRAL_8X7B)
    spec = FAMILIES["mixtral"].spec(MIXTRAL_8X7B)
    for _ in range(30):
        kv = KvConfig(
            block_tokens=rng.choice([8, 16, 32]),
            kv_bytes=rng.choice([None, rng.randrange(1 << 23, 1 << 33)]),
        )
        context = rng.choice([None, rng.randrange(16, 32768)])
        scheduler = SchedulerConfig(max_running=rng.randrange(1, 100))
        model = ModelConfig(context_tokens=context)
        budget = rng.choice([None, rng.randrange(1 << 32, 1 << 36)])
        experts = ExpertConfig(host_memory_bytes=budget)
        config = EngineConfig(model=model, kv=kv, scheduler=scheduler, experts=experts)
        shape = read_shape(model, file)
        loaded = SimpleNamespace(
            spec=spec,
            dtype=torch.bfloat16,
            context_tokens=context or spec.context_tokens,
            resident_bytes=shape.rest_bytes,
            kv_elsewhere=False,
            runtime=SimpleNamespace(host_slot_bytes=budget and slot_bytes(shape)),
        )
        expected = kv_sizes(config, cast(Any, loaded)).num_blocks
        block_bytes = KvPool.bytes_per_block(spec, kv.block_tokens, torch.bfloat16)
        assert shape.kv_token_bytes * kv.block_tokens == block_bytes
        found = num_kv_blocks(
            config, block_bytes, shape.rest_bytes, slot_bytes(shape), shape.context_tokens
        )
        assert found == expected, f"seed {seed}"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "mamba"}, ModelError, "'mamba' is not one of"),
        ({"model_type": None}, ModelError, "model_type"),
        ({"num_experts_per_tok": 9}, ModelError, "top_k"),
        ({"torch_dtype": "int3"}, ModelError, "int3"),
        ({"hidden_act": "sorcery"}, ModelError, "sorcery"),
        ({"new_trick": 7}, ModelError, "new_trick"),
    ],
)
def test_what_cannot_be_served_is_named(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        read_shape(ModelConfig(), write(tmp_path, MIXTRAL_8X7B | change))


def test_settings_that_contradict_the_model_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, MIXTRAL_8X7B)
    with pytest.raises(ConfigError, match=r"99999 is above .*32768"):
        read_shape(ModelConfig(context_tokens=99999), file)
    small = AutoConfig.for_model("mixtral", **SMALL | MORE["mixtral"]).to_dict()
    config = write(tmp_path, small | {"torch_dtype": "bfloat16", "dtype": None})
    write_random_packed(config, tmp_path / "packed", "int4")
    with pytest.raises(ConfigError, match="is packed already"):
        read_shape(ModelConfig(quantize="int4"), tmp_path / "packed")
    with pytest.raises(ConfigError, match="packed to compute in bfloat16"):
        read_shape(ModelConfig(dtype="float32"), tmp_path / "packed")


def test_tensors_where_nothing_is_packed() -> None:
    """On the torch backend: as many bytes as numbers, and one table for embedding and head."""
    shape = read_shape(ModelConfig(), BUNDLED_MODEL, native=False)
    assert shape.rest_bytes + shape.expert_bytes == 4 * shape.num_parameters
