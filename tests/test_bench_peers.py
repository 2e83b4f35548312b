"""The peers benchmark: what its engines read is the same, and its bytes are those of the files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from bench_peers import TINY, setting
from peers.figures import LIMIT_TARGETS, Figures
from peers.layer_work import (
    Experts,
    LayerShape,
    linear_loop,
    random_layer,
    relative_error,
    routings,
    time_layer,
)
from peers.measure import Workload
from peers.plan import Plan
from peers.processes import run_alone
from peers.traffic import StoredBits, Traffic
from peers.weights import QUANTISED, quantise_gguf, write_checkpoint, write_gguf
from random_checkpoint import INDEX_FILE
from safetensors import safe_open
from support.randomness import fresh_generators, fresh_seed

BF16 = gguf.GGMLQuantizationType.BF16
EXPERT_PARTS = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("peers"), TINY, fresh_seed())


@pytest.fixture(scope="module")
def bf16_file(checkpoint: Path) -> Path:
    path = checkpoint.parent / "bf16.gguf"
    write_gguf(checkpoint, path)
    return path


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in set(json.loads((path / INDEX_FILE).read_text())["weight_map"].values()):
        with safe_open(path / file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def read_gguf(path: Path) -> dict[str, torch.Tensor]:
    """By name, as float32, dequantised by the gguf package."""
    return {
        tensor.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def test_gguf_holds_the_weights_of_the_checkpoint(checkpoint: Path, bf16_file: Path) -> None:
    """Every tensor, by llama.cpp's names, written out here once more: bit for bit."""
    theirs, ours = read_gguf(bf16_file), read_checkpoint(checkpoint)
    expected = {
        "token_embd": ours["model.embed_tokens.weight"],
        "output_norm": ours["model.norm.weight"],
        "output": ours["lm_head.weight"],
    }
    for layer in range(TINY.num_hidden_layers):
        source, block = f"model.layers.{layer}.", f"blk.{layer}."
        expected[f"{block}attn_norm"] = ours[f"{source}input_layernorm.weight"]
        expected[f"{block}ffn_norm"] = ours[f"{source}post_attention_layernorm.weight"]
        expected[f"{block}ffn_gate_inp"] = ours[f"{source}mlp.gate.weight"]
        expected[f"{block}attn_output"] = ours[f"{source}self_attn.o_proj.weight"]
        for letter in "qkv":
            expected[f"{block}attn_{letter}"] = ours[f"{source}self_attn.{letter}_proj.weight"]
        for letter in "qk":
            expected[f"{block}attn_{letter}_norm"] = ours[f"{source}self_attn.{letter}_norm.weight"]
        for part, name in EXPERT_PARTS.items():
            experts = [
                ours[f"{source}mlp.experts.{e}.{name}.weight"] for e in range(TINY.num_experts)
            ]
            expected[f"{block}{part}"] = torch.stack(experts)
    assert theirs.keys() == {f"{name}.weight" for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(theirs[f"{name}.weight"], tensor.float()), name


def test_matrices_are_stored_in_bf16_and_norms_in_float32(bf16_file: Path) -> None:
    for tensor in gguf.GGUFReader(bf16_file).tensors:
        small = "norm" in tensor.name or "ffn_gate_inp" in tensor.name
        assert (tensor.tensor_type == BF16) != small, tensor.name


@pytest.mark.parametrize(("name", "largest_error"), [("q8_0", 0.01), ("q4_0", 0.12), ("q4_k", 0.1)])
def test_quantised_files_are_near_the_weights(
    bf16_file: Path, name: str, largest_error: float
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python: pip install '.[peers]'")
    path = bf16_file.with_name(f"{name}.gguf")
    quantise_gguf(bf16_file, path, QUANTISED[name], threads=1)
    exact, found = read_gguf(bf16_file), read_gguf(path)
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            assert torch.equal(found[tensor.name], exact[tensor.name])
            continue
        assert tensor.tensor_type.name == name.upper(), tensor.name  # pure: no matrix kept wider
        error = (found[tensor.name] - exact[tensor.name]).norm() / exact[tensor.name].norm()
        assert 0 < error < largest_error, (tensor.name, float(error))


def test_another_shape_in_the_folder_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="another shape or seed"):
        write_checkpoint(checkpoint.parent, TINY, seed=-1)


def test_step_bytes_are_those_of_the_file(bf16_file: Path) -> None:
    """With every expert in use and no kv: the matrices of the file but the embedding."""
    expected = sum(
        tensor.n_bytes
        for tensor in gguf.GGUFReader(bf16_file).tensors
        if "norm" not in tensor.name and tensor.name != "token_embd.weight"
    )
    assert Traffic(TINY).step_bytes(StoredBits(), TINY.num_experts, 1, 0) == expected


def test_uniform_experts_against_drawing_them() -> None:
    """16 of 16 choose 4: counted over many draws, within five standard errors."""
    choices = routings(LayerShape(num_experts=16, top_k=4), 1, 6)
    counts = [len(experts.ids.unique()) for _, experts in itertools.islice(choices, 2000)]
    mean = sum(counts) / len(counts)
    spread = torch.tensor(counts).float().std().item() / len(counts) ** 0.5
    assert abs(mean - Traffic(TINY).uniform_experts(6)) < 5 * spread


def test_one_row_calls_touch_every_expert_before_any_again() -> None:
    shape = LayerShape(num_experts=16, top_k=4)
    calls = [experts.ids for _, experts in itertools.islice(routings(shape, 1, 1), 4)]
    assert sorted(torch.cat(calls).flatten().tolist()) == list(range(16))


def test_the_loop_computes_the_layer() -> None:
    """Against float64, expert by expert."""
    shape = LayerShape(hidden_size=32, intermediate_size=16, num_experts=4, top_k=2)
    weights = random_layer(shape, torch.float32, fresh_seed())
    _, draw = fresh_generators()
    x = torch.randn(5, 32, generator=draw)
    _, experts = next(routings(shape, 1, 5))
    expected = torch.zeros(5, 32, dtype=torch.float64)
    for row, (ids, factors) in enumerate(zip(experts.ids, experts.weights, strict=True)):
        for expert, factor in zip(ids.tolist(), factors.tolist(), strict=True):
            gate_up = weights.gate_up[expert].double() @ x[row].double()
            hidden = torch.nn.functional.silu(gate_up[:16]) * gate_up[16:]
            expected[row] += factor * (weights.down[expert].double() @ hidden)
    assert torch.allclose(linear_loop(weights, x, experts).double(), expected, rtol=1e-5, atol=1e-7)


def test_a_wrong_layer_shows_in_its_error() -> None:
    shape = LayerShape(hidden_size=32, intermediate_size=16, num_experts=4, top_k=2)
    weights = random_layer(shape, torch.bfloat16)

    def swapped(layer: int, x: torch.Tensor, experts: Experts) -> torch.Tensor:
        return linear_loop(weights, x, Experts(experts.ids.roll(1, 0), experts.weights))

    assert relative_error(swapped, weights, shape) > 0.1
    assert time_layer(swapped, shape, 1, 2, torch.bfloat16, calls=2) > 0


def test_ratios_take_the_better_peer_and_name_what_is_missing() -> None:
    def run(**rates: float) -> list[dict[str, object]]:
        return [{"rates": rates}]

    results = {
        "moeserve int4": [
            {
                "rates": {"decode_1": 30.0, "decode_streams": 80.0, "prefill": 200.0},
                "stored_bits": {"experts": 4.5, "product": 4.5, "head": 8.0, "router": 32.0},
                "limits": {
                    "decode_1": {"read": 2e9, "int8": 2e9, "f32": 1e9},
                    "decode_streams": {"read": 3e9, "int8": 2e9, "f32": 1e9},
                    "prefill": {"read": 2e9, "int8": 4e9, "f32": 1e9},
                },
            }
        ],
        "llama.cpp Q4_0": run(decode_1=15.0, decode_streams=50.0, prefill=110.0),
        "llama.cpp Q4_K": run(decode_1=20.0, decode_streams=40.0, prefill=100.0),
        "moeserve bf16": [{"skipped": "for a test"}],
    }
    contexts = {"decode_1": 80.0, "decode_streams": 72.0, "prefill": 512.0}
    figures = Figures(results, Traffic(TINY), contexts)
    ratios = {(ratio.name, ratio.against): ratio for ratio in figures.peer_ratios()}
    assert ratios["decode, 1 stream, int4", "llama.cpp Q4_K"].found == pytest.approx(1.5)
    assert ratios["decode, 16 streams, int4", "llama.cpp Q4_0"].found == pytest.approx(1.6)
    missing = ratios["decode, 1 stream, bf16", "llama.cpp BF16"]
    assert missing.found is None
    assert not missing.reached
    assert "for a test" in missing.reason
    bits = StoredBits(experts=4.5, product=4.5, head=8.0)
    step = Traffic(TINY).step_bytes(bits, TINY.num_experts_per_tok, 1, 80.0)
    assert figures.bound("int4", "decode_1") == pytest.approx(2e9 / step)
    shares = {ratio.name: ratio for ratio in figures.limit_ratios()}
    assert shares["decode, 1 stream, int4"].found == pytest.approx(30.0 * step / 2e9)
    ops = Traffic(TINY).prefill_ops(512)
    assert shares["prefill 512, int4"].found == pytest.approx(200.0 * ops / (4e9 * 512))
    assert "for a test" in shares["prefill 512, bf16"].reason
    assert figures.bound("bf16", "prefill") is None


def test_each_round_is_held_against_its_own_limits() -> None:
    """A machine that gives half as much in one round changes no share."""
    contexts = {"decode_1": 80.0, "decode_streams": 72.0, "prefill": 512.0}

    def shares(*speeds: float) -> list[float | None]:
        rounds = [
            {
                "rates": dict.fromkeys(LIMIT_TARGETS, 10.0 * speed),
                "limits": {m: {"read": 1e9 * speed, "int8": 1e9 * speed} for m in LIMIT_TARGETS},
            }
            for speed in speeds
        ]
        figures = Figures({"moeserve int8": rounds}, Traffic(TINY), contexts)
        return [r.found for r in figures.limit_ratios() if r.name.endswith("int8")]

    once = shares(1.0)
    assert all(share is not None for share in once)
    assert shares(0.5) == pytest.approx(once)
    assert shares(0.9, 0.5, 0.7) == pytest.approx(once)


def test_engines_in_processes_of_their_own_say_the_same(checkpoint: Path) -> None:
    """17 prompts in bfloat16: near ties may fall either way, so not every token must be equal."""
    work = {"vocab_size": TINY.vocab_size, "decode_steps": 3, "stream_steps": 2}
    common = {"workload": work, "threads": 1}
    experts = {"num_threads": 1, "cpu_backend": "torch"}
    config = {"model": {"model": str(checkpoint)}, "experts": experts}
    ours = run_alone("ours", {**common, "config": config})
    peer = run_alone(
        "transformers", {**common, "checkpoint": str(checkpoint), "count_experts": True}
    )
    results = {"moeserve bf16": [ours], "transformers bf16": [peer]}
    figures = Figures(results, Traffic(TINY), {"decode_1": 65.5, "decode_streams": 65.0})
    agreement = figures.agreement("moeserve bf16")
    assert agreement is not None, results
    assert agreement["first"] > 0.8
    assert all(rate > 0 for result in (ours, peer) for rate in result["rates"].values())
    assert figures.num_experts(1) == (TINY.num_experts_per_tok, "counted in the router's output")
    assert TINY.num_experts_per_tok < figures.num_experts(16)[0] <= TINY.num_experts


def test_what_is_not_there_is_skipped_and_what_breaks_has_failed(checkpoint: Path) -> None:
    unknown = {"config": {"model": {"model": str(checkpoint), "no_such": 1}}, "workload": {}}
    assert "no_such" in run_alone("ours", {**unknown, "workload": {"vocab_size": 8}})["skipped"]
    missing = {"config": {"model": {"model": str(checkpoint / "absent")}}}
    failed = run_alone("ours", {**missing, "workload": {"vocab_size": 8}})["failed"]
    assert "absent" in failed


def test_settings_reach_the_config_of_every_width() -> None:
    plan = Plan(
        data=Path("data"),
        shape=TINY,
        work=Workload(vocab_size=TINY.vocab_size),
        threads=2,
        repeats=1,
        engines=("limits", "moeserve int"),
        ours_python="python",
        ours_config=(setting("experts.cpu_backend=native"), setting("kv.block_tokens=32")),
        packed={"int8": Path("data/packed-int8")},
    )
    assert plan.wants("moeserve int8")
    assert not plan.wants("moeserve bf16")
    assert plan.ours_settings("int4", 1) == {
        "model": {"model": "data/checkpoint", "quantize": "int4"},
        "experts": {"num_threads": 1, "cpu_backend": "native"},
        "kv": {"block_tokens": 32},
    }
    # A packed directory says itself how it is quantised.
    assert plan.ours_settings("int8", 1)["model"] == {"model": "data/packed-int8"}
