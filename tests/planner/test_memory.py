"""What a plan says of memory, against what an engine's process then takes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moeserve.cache.expert_cache import Tier
from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig
from moeserve.cpu_backend.machine import PROC
from moeserve.experts.schedule.profile import Profile
from moeserve.experts.schedule.profile_file import shipped_profile
from moeserve.planner.deployment import sized
from moeserve.planner.lookup import find_shape
from moeserve.planner.memory import HUGE_PAGE_BYTES, slot_bytes
from moeserve.planner.nearest import Change, DoesNotFit, nearest_fit, plan_on
from moeserve.planner.plan_types import MemoryPart, MemoryPlan, PlanRequest, Traffic
from moeserve.planner.process_memory import measure_process_bytes
from moeserve.planner.random_model import write_random_packed

#: prints the resident set of a process that has served the traffic of a request
SERVE = """
import random, sys, msgspec
from moeserve.environment import tune_native_libraries
tune_native_libraries()
from moeserve.config import EngineConfig
from moeserve.core import EngineRequest, SamplingParams
from moeserve.engine.engine import Engine
from moeserve.planner.process_memory import resident_bytes
config, concurrency, prompt, output, seed = msgspec.json.decode(sys.stdin.buffer.read())
engine = Engine.from_config(msgspec.convert(config, EngineConfig))
rng = random.Random(seed)
for number in range(concurrency):
    ids = [rng.randrange(1, engine.loaded.spec.vocab_size) for _ in range(prompt)]
    params = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
    engine.add(EngineRequest(request_id=str(number), token_ids=ids, params=params))
while engine.has_work:
    engine.step()
print(resident_bytes())
"""
MID: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 768,
    "intermediate_size": 768,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 16000,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
#: latent attention, whose queries are tensors as wide as the latents
LATENT: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "kv_lora_rank": 256,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "topk_method": "greedy",
    "vocab_size": 16000,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
NATIVE = ExpertConfig(cpu_backend="native", num_threads=2)


@pytest.fixture(scope="module")
def here() -> Profile:
    """Sizes of this machine's processes; its rates are of no account here."""
    if not (PROC / "self" / "status").exists():
        pytest.skip("no /proc to read a resident set from")
    sheet = shipped_profile("a40-xeon8380")
    return msgspec.structs.replace(sheet, process_bytes=measure_process_bytes(1), source="measured")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: packed_model(tmp_path_factory.mktemp(name), config)
        for name, config in (("mid", MID), ("latent", LATENT))
    }


def packed_model(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    write_random_packed(folder / "config.json", folder / "packed", "int8")
    return folder / "packed"


def served_bytes(request: PlanRequest, seed: int) -> int:
    traffic = request.traffic
    lengths = [traffic.concurrency, traffic.prompt_tokens, traffic.output_tokens, seed]
    engine = msgspec.to_builtins(request.engine)
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        input=msgspec.json.encode([engine, *lengths]),
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return int(done.stdout)


@pytest.mark.parametrize(
    ("which", "experts", "traffic"),
    [
        ("bundled", NATIVE, Traffic(concurrency=6, prompt_tokens=300, output_tokens=4)),
        ("mid", NATIVE, Traffic(concurrency=4, prompt_tokens=200, output_tokens=4)),
        ("latent", NATIVE, Traffic(concurrency=6, prompt_tokens=300, output_tokens=4)),
        (
            "mid",
            ExpertConfig(cpu_backend="native", num_threads=2, host_slots=24),
            Traffic(concurrency=4, prompt_tokens=200, output_tokens=4),
        ),
    ],
)
def test_a_plan_is_within_three_percent_of_the_process(
    which: str, experts: ExpertConfig, traffic: Traffic, here: Profile, packed: dict[str, Path]
) -> None:
    model = ModelConfig() if which == "bundled" else ModelConfig(model=str(packed[which]))
    request = PlanRequest(engine=EngineConfig(model=model, experts=experts), traffic=traffic)
    planned = sized(request, here, find_shape(request.engine)).memory.steady_bytes(Tier.HOST)
    taken = served_bytes(request, seed := random.randrange(1 << 30))
    assert planned == pytest.approx(taken, rel=0.03), f"seed {seed}"


def request_for(**settings: Any) -> PlanRequest:
    traffic = Traffic(concurrency=2, prompt_tokens=64, output_tokens=32)
    return PlanRequest(engine=EngineConfig(**settings), traffic=traffic)


def test_parts_follow_from_the_models_sizes() -> None:
    sheet = shipped_profile("a40-xeon8380")
    request = request_for(kv=KvConfig(num_blocks=100), experts=ExpertConfig(host_slots=10))
    shape = find_shape(request.engine)
    memory = sized(request, sheet, shape).memory
    parts = {part.name: part for part in memory.parts}
    assert parts["weights of every token"].num_bytes == shape.rest_bytes
    assert parts["expert slots"].num_bytes == 10 * slot_bytes(shape)
    assert parts["experts"].tier is Tier.DISK
    blocks = 2 * -(-(64 + 32 - 1) // 16)
    assert parts["kv of the requests"].num_bytes == blocks * 16 * shape.kv_token_bytes
    resident = sized(request_for(kv=KvConfig(num_blocks=100)), sheet, shape).memory
    by_name = {part.name: part for part in resident.parts}
    assert by_name["experts"].num_bytes == shape.expert_bytes
    pool = by_name["kv of the requests"].num_bytes + by_name["kv pool beyond them"].num_bytes
    assert pool == 100 * 16 * shape.kv_token_bytes
    matrices = 1 + sum(len(layer.products) for layer in shape.layers)
    assert 0 <= by_name["rounding to huge pages"].num_bytes < matrices * HUGE_PAGE_BYTES
    of_a_layer = shape.expert_bytes // len(shape.layers)
    rounding = by_name["rounding of experts"].num_bytes
    assert rounding == len(shape.layers) * (-of_a_layer % HUGE_PAGE_BYTES)


def test_slots_that_nobody_chose_fit_the_device() -> None:
    """What is left of its memory is filled, and no part of the plan goes beyond it."""
    sheet = shipped_profile("rtx4090-pcie4")
    assert sheet.device is not None
    for memory_bytes in (64 << 20, 96 << 20, 10 << 30):
        device = msgspec.structs.replace(sheet.device, memory_bytes=memory_bytes)
        profile = msgspec.structs.replace(sheet, device=device)
        request = request_for(
            model=ModelConfig(device="emulated"),
            kv=KvConfig(num_blocks=100),
            experts=ExpertConfig(device_memory_bytes=memory_bytes),
        )
        deployment = plan_on(request, profile, find_shape(request.engine))
        assert deployment.memory.peak_bytes(Tier.DEVICE) <= memory_bytes


def test_a_pool_counts_at_most_beside_expert_slots() -> None:
    """Prefixes of past requests fill it, whatever slots take."""
    sheet = shipped_profile("a40-xeon8380")
    request = request_for(kv=KvConfig(num_blocks=100), experts=ExpertConfig(host_slots=10))
    shape = find_shape(request.engine)
    memory = sized(request, sheet, shape).memory
    parts = {part.name: part for part in memory.parts}
    beyond = parts["kv pool beyond them"]
    pool_bytes = 100 * 16 * shape.kv_token_bytes
    assert parts["kv of the requests"].num_bytes + beyond.num_bytes == pool_bytes
    assert beyond.peak_only
    needed = memory.peak_bytes(Tier.HOST)
    cpu = msgspec.structs.replace(sheet.cpu, memory_bytes=needed - 1)
    with pytest.raises(DoesNotFit):
        plan_on(request, msgspec.structs.replace(sheet, cpu=cpu), shape)


@pytest.mark.parametrize("spare_slots", [-5.5, 4.5, 1000.0])
def test_kv_has_of_a_budget_what_experts_leave(spare_slots: float) -> None:
    """spare_slots: beyond all experts and the kv of the requests, in slots."""
    sheet = shipped_profile("a40-xeon8380")
    blocks, record = 200, slot_bytes(shape := find_shape(request_for().engine))
    block_bytes = 16 * shape.kv_token_bytes
    used_bytes = 2 * -(-(64 + 32 - 1) // 16) * block_bytes
    shared = used_bytes + int((shape.num_experts + spare_slots) * record)
    experts = ExpertConfig(host_memory_bytes=shape.rest_bytes + shared)
    request = request_for(kv=KvConfig(num_blocks=blocks), experts=experts)
    deployment = sized(request, sheet, shape)
    parts = {part.name: part for part in deployment.memory.parts}
    slots_bytes = parts["expert slots"].num_bytes
    assert slots_bytes == min(shape.num_experts, (shared - used_bytes) // record) * record
    held = slots_bytes + used_bytes + parts["kv pool beyond them"].num_bytes
    assert held == min(shared, slots_bytes + blocks * block_bytes)


def test_peaks_count_against_limits() -> None:
    steady = MemoryPart("weights", Tier.HOST, 60)
    peak = MemoryPart("prefill", Tier.HOST, 50, peak_only=True)
    elsewhere = MemoryPart("experts", Tier.DISK, 1000)
    memory = MemoryPlan((steady, peak, elsewhere), {Tier.HOST: 100})
    assert memory.steady_bytes(Tier.HOST) == 60
    assert memory.peak_bytes(Tier.HOST) == 110
    assert not memory.fits
    assert MemoryPlan((steady, elsewhere), {Tier.HOST: 100}).fits


def test_the_nearest_that_fits_changes_as_little_as_possible() -> None:
    """By memory sizes that leave room for less and less."""
    sheet = shipped_profile("a40-xeon8380")
    request = request_for(kv=KvConfig(kv_bytes=256 << 20), experts=NATIVE)
    shape = find_shape(request.engine)

    def machine(limit: int) -> Profile:
        cpu = msgspec.structs.replace(sheet.cpu, memory_bytes=limit)
        disk = shipped_profile("rtx4090-pcie4").disk
        return msgspec.structs.replace(sheet, cpu=cpu, disk=disk)

    def nearest(limit: int) -> Change:
        found = nearest_fit(request, machine(limit), shape)
        assert found is not None
        again = plan_on(found.request, machine(limit), find_shape(found.request.engine))
        assert again.memory.fits
        return found

    def peak(asked: PlanRequest) -> int:
        return sized(asked, sheet, find_shape(asked.engine)).memory.peak_bytes(Tier.HOST)

    less_kv = nearest(peak(request) - 1)
    assert less_kv.flags.startswith("--kv-bytes")
    fewer_bits = nearest(peak(less_kv.request) - 1)
    assert fewer_bits.flags.startswith("--quantize int8")
    on_disk = nearest(peak(fewer_bits.request) - 1)  # int4 fills as many huge pages here
    assert on_disk.flags.startswith("--host-memory")
    with pytest.raises(DoesNotFit, match="no smaller setting fits"):
        plan_on(request, machine(1 << 20), shape)
