"""Equations of MoE-Lens, against sums and against what the paper publishes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from moeserve.config import EngineConfig, ExpertConfig, ModelConfig
from moeserve.experts.schedule.profile import Figure, TransferPoint
from moeserve.experts.schedule.profile_file import shipped_profile
from moeserve.planner.bound import Bound
from moeserve.planner.deployment import sized
from moeserve.planner.lookup import find_shape
from moeserve.planner.moe_lens import (
    expert_tokens_to_saturate,
    parallelism_memory_efficiency,
    sequences_in_step,
    tokens_to_saturate,
)
from moeserve.planner.plan_types import PlanRequest, Traffic

#: Mixtral-8x7B (arXiv:2401.04088): 32 layers of 8 experts, 2 of them for a token
EXPERTS, TOP_K, LAYERS = 8, 2, 32
HIDDEN, INNER = 4096, 14336
BF16 = 2
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
A40 = shipped_profile("a40-xeon8380")


def test_mixtral_on_an_a40_needs_19200_tokens_at_once() -> None:
    """It follows from 150 TFLOPS and 32000 / 1024 GB/s; that they rounded so is inferred."""
    assert expert_tokens_to_saturate(150e12, 31.25e9, EXPERTS, TOP_K, BF16) == pytest.approx(19_200)
    peak = A40.device.ops_per_s["bf16"].value if A40.device is not None else 0.0
    exact = expert_tokens_to_saturate(peak, 32e9, EXPERTS, TOP_K, BF16)
    assert exact == pytest.approx(19_200, rel=0.03)


def test_size_cancels_out_of_experts() -> None:
    expert = 3 * HIDDEN * INNER
    weight_bytes = LAYERS * EXPERTS * expert * BF16
    ops = LAYERS * TOP_K * expert * 2
    by_size = tokens_to_saturate(149.7e12, 32e9, weight_bytes, ops)
    assert by_size == pytest.approx(expert_tokens_to_saturate(149.7e12, 32e9, EXPERTS, TOP_K, BF16))


def test_a_plan_for_mixtral_says_both(tmp_path: Path) -> None:
    """19.2k tokens, and 614 GB of kv for them at 256 tokens, where a GB has 1000 MiB. A slot on the
    device saves what crosses the link, and the tokens that hide it."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert A40.device is not None
    peaks = {**A40.device.ops_per_s, "bf16": Figure(value=150e12)}
    theirs = structs.replace(
        A40,
        device=structs.replace(A40.device, ops_per_s=peaks),
        link=[TransferPoint(num_bytes=1 << 20, us=Figure(value=(1 << 20) / 31.25e9 * 1e6))],
        cpu=structs.replace(A40.cpu, memory_bytes=1 << 40),
    )
    engine = EngineConfig(
        model=ModelConfig(model=str(tmp_path / "config.json"), device="emulated"),
        experts=ExpertConfig(device_slots=1),
    )
    traffic = Traffic(concurrency=1, prompt_tokens=128, output_tokens=128)
    request = PlanRequest(engine=engine, traffic=traffic)
    deployment = sized(request, theirs, find_shape(engine))
    found = Bound(replace(deployment, device_slots=0)).saturation()
    assert found.tokens == pytest.approx(19_200)
    assert round(found.kv_bytes / (1000 * 2**20)) == 614
    half = Bound(replace(deployment, device_slots=LAYERS * EXPERTS // 2)).saturation()
    assert half.tokens == pytest.approx(9_600)
    assert found.efficiency == pytest.approx(parallelism_memory_efficiency(128, 128))


@pytest.mark.parametrize(
    ("p", "g", "efficiency"),
    [(100, 128, 456 / (328 * 128)), (98, 32, 260 / 7296), (926, 128, 2108 / (1980 * 128))],
)
def test_parallelism_memory_efficiency_of_known_lengths(p: int, g: int, efficiency: float) -> None:
    assert parallelism_memory_efficiency(p, g) == pytest.approx(efficiency)


def test_efficiency_is_tokens_over_the_kv_held_step_by_step() -> None:
    rng = random.Random(seed := random.randrange(1 << 30))
    for _ in range(50):
        p, g = rng.randrange(1, 4000), rng.randrange(1, 1000)
        held = sum(p + step + 0.5 for step in range(g))  # in the middle of each step
        expected = (p + g) / held
        assert parallelism_memory_efficiency(p, g) == pytest.approx(expected), f"seed {seed}"


def test_efficiency_is_that_of_a_schedule() -> None:
    """Sequences that begin one after the other, each giving its place to the next: counted."""
    p, g, num = 40, 25, 200
    tokens = kv = 0
    starts = [i % g for i in range(num)]  # at all stages at once
    for step in range(10 * g):
        for start in starts:
            stage = (step - start) % g
            tokens += p + 1 if stage == 0 else 1
            kv += p + stage
    # A sum over whole steps, where the equation has an integral: half a token of kv in each.
    assert tokens / kv == pytest.approx(
        parallelism_memory_efficiency(p, g), rel=0.5 / (p + g / 2 - 0.5) + 1e-6
    )


def test_a_sequence_holds_half_of_its_output_on_average() -> None:
    assert sequences_in_step(100, 128, 164_000) == 1000
