"""What is said to fit instead of a plan that does not fit, as a user follows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.known_configs import MIXTRAL_8X7B
from support.plan_command import SHEET, plan, refusal, write_profile_of_here

#: latent attention and most weights in experts, which are far too many for a small machine
DEEPSEEK_V2: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 102400,
    "max_position_embeddings": 16384,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
DENSE_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
MODELS = {"v2": DEEPSEEK_V2, "mixtral": MIXTRAL_8X7B, "dense": DENSE_8B}


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A profile of a machine with 24 GiB and a disk."""
    write_profile_of_here(path := tmp_path / "machine.json")
    profile = json.loads(path.read_bytes())
    profile["cpu"]["memory_bytes"] = 24 << 30
    path.write_text(json.dumps(profile))
    return str(path)


def hint_of(said: str) -> list[str]:
    return said.rpartition("nearest that fits: ")[2].strip().removesuffix(")").split()


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    for name, config in MODELS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    return {name: str(tmp_path / f"{name}.json") for name in MODELS}


@pytest.mark.parametrize(
    ("model", "flags", "found"),
    [
        # Weights of every token in bfloat16 fill that machine: only fewer bits and the disk do.
        ("v2", "", "--host-memory # --quantize int8"),
        ("v2", "--host-slots 5000", "--host-slots # --quantize int8"),
        ("v2", "--quantize int4 --host-memory 200GiB", "--host-memory #"),
        ("dense", "--concurrency 500 --num-blocks 100000 --prompt-tokens 4000",
         "--quantize int4 --max-running # --num-blocks #"),
        ("dense", "--concurrency 64 --kv-bytes 60GiB", "--kv-bytes #"),
    ],
)  # fmt: skip
def test_what_is_said_to_fit_fits(
    model: str,
    flags: str,
    found: str,
    models: dict[str, str],
    small: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [models[model], "--hardware", small, *flags.split(), "--bound-only", "--no-advice"]
    nearest = hint_of(refusal(capsys, *arguments))
    assert " ".join("#" if word.isdigit() else word for word in nearest) == found
    assert plan(capsys, *arguments, *nearest)["memory"]["fits"]


@pytest.mark.parametrize("flags", ["--device-slots 250 --host-slots 250", "--device-slots 250"])
def test_fewer_experts_on_a_device(
    flags: str, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [models["mixtral"], "--hardware", SHEET, "--quantize", "int8", *flags.split()]
    nearest = hint_of(refusal(capsys, *arguments, "--bound-only", "--no-advice"))
    assert nearest[0] == "--device-slots"
    again = plan(capsys, *arguments, *nearest, "--bound-only", "--no-advice")
    assert again["settings"]["device_slots"] == int(nearest[1]) < 250


def test_less_kv_still_holds_the_longest_request_of_a_trace(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though what is planned for is their mean."""
    config, trace = tmp_path / "dense.json", tmp_path / "trace.jsonl"
    config.write_text(json.dumps(DENSE_8B))
    lines = [
        {"timestamp": 3_600_000 * rank, "input_length": size, "output_length": 4}
        for rank, size in enumerate((10, 4000, 10, 10))
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    flags = [str(config), "--hardware", small, "--no-advice", "--workload", str(trace)]
    said = refusal(capsys, *flags, "--kv-bytes", str(16 << 30))
    nearest = said.split("nearest that fits: ")[1].rstrip(")\n").split()
    assert nearest[0] == "--kv-bytes"
    assert plan(capsys, *flags, *nearest)["memory"]["fits"]
