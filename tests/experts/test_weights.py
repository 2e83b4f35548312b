"""Conversions of expert weights against transformers' own, and against their inverses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.randomness import fresh_generators
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moeserve.core import ExpertSpec, ExpertWeights, ModelError
from moeserve.experts.weights import (
    check_expert_weights,
    deinterleave_gate_up,
    dequantize_fp8_blocks,
    dequantize_mxfp4,
    interleave_gate_up,
    pack_gate_up,
    stack_experts,
    transpose_experts,
    unpack_gate_up,
)


def test_separate_and_packed_are_the_same() -> None:
    _, generator = fresh_generators()
    gates = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    ups = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    packed = pack_gate_up(stack_experts(gates), stack_experts(ups))
    assert packed.shape == (3, 12, 4)
    for expert in range(3):
        assert torch.equal(packed[expert], torch.cat((gates[expert], ups[expert])))
    gate, up = unpack_gate_up(packed)
    assert torch.equal(gate, stack_experts(gates))
    assert torch.equal(up, stack_experts(ups))


@pytest.mark.parametrize("dim", [-1, -2, 1, 2])
def test_interleaved(dim: int) -> None:
    _, generator = fresh_generators()
    interleaved = torch.randn(3, 8, 10, generator=generator)
    result = deinterleave_gate_up(interleaved, dim)
    moved, expected = result.movedim(dim, 0), interleaved.movedim(dim, 0)
    half = moved.shape[0] // 2
    assert torch.equal(moved[:half], expected[0::2])
    assert torch.equal(moved[half:], expected[1::2])
    assert torch.equal(interleave_gate_up(result, dim), interleaved)


def test_transposed_interleaved_gives_the_same_products() -> None:
    """gpt-oss's x @ W with gate and up by turns, against ours with W as [2I, H]."""
    _, generator = fresh_generators()
    stored = torch.randn(2, 8, 12, generator=generator)  # [E, H, 2I]
    x = torch.randn(5, 8, generator=generator)
    ours = deinterleave_gate_up(transpose_experts(stored), dim=-2)
    assert ours.is_contiguous()
    for expert in range(2):
        gate_up = x @ stored[expert]
        expected = torch.cat((gate_up[:, ::2], gate_up[:, 1::2]), dim=-1)
        torch.testing.assert_close(x @ ours[expert].T, expected)
    assert torch.equal(transpose_experts(transpose_experts(stored)), stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mxfp4_equals_transformers_bit_by_bit(dtype: torch.dtype) -> None:
    """Every code in every place, every scale from the smallest to the largest finite one."""
    _, generator = fresh_generators()
    blocks = torch.randint(0, 256, (2, 256, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 255, (2, 256, 3), generator=generator, dtype=torch.uint8)
    scales[0, :, 0] = torch.arange(256).clamp(max=254).to(torch.uint8)
    ours = dequantize_mxfp4(blocks, scales, dtype)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    assert ours.shape == (2, 256, 96)
    assert ours.dtype is dtype
    assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
    assert torch.equal(dequantize_mxfp4(blocks[0], scales[0], dtype), ours[0])


def test_mxfp4_by_hand() -> None:
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0] = 0x7 | 0x9 << 4  # 6.0 in the lower half, -0.5 in the upper
    dense = dequantize_mxfp4(blocks, torch.tensor([[128]], dtype=torch.uint8), torch.float32)
    assert dense[0, :3].tolist() == [12.0, -1.0, 0.0]


@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)], ids=str)
def test_fp8_equals_transformers_bit_by_bit(shape: tuple[int, ...]) -> None:
    _, generator = fresh_generators()
    # Within ±448: beyond, some versions of torch give NaN and others saturate.
    weight = torch.randn(shape, generator=generator).mul(100).clamp(-448, 448)
    weight = weight.to(torch.float8_e4m3fn)
    grid = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    scale = torch.rand(grid, generator=generator) / 100
    theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(weight, scale, torch.bfloat16)
    assert torch.equal(dequantize_fp8_blocks(weight, scale, torch.bfloat16), theirs)


def test_fp8_with_cut_blocks() -> None:
    rng, generator = fresh_generators()
    rows, columns = rng.randint(129, 300), rng.randint(1, 300)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator)
    dense = dequantize_fp8_blocks(weight, scale, torch.float32)
    for _ in range(200):
        i, j = rng.randrange(rows), rng.randrange(columns)
        assert dense[i, j] == weight[i, j].float() * scale[i // 128, j // 128]


def test_quantised_tensors_that_do_not_fit_are_refused() -> None:
    blocks = torch.zeros(2, 3, 16, dtype=torch.uint8)
    scales = torch.zeros(2, 3, dtype=torch.uint8)
    for bad_blocks, bad_scales in (
        (blocks.int(), scales),
        (blocks, scales.float()),
        (blocks[..., :8], scales),
        (blocks, scales[:, :2]),
    ):
        with pytest.raises(ModelError, match="mxfp4"):
            dequantize_mxfp4(bad_blocks, bad_scales, torch.float32)
    weight = torch.zeros(128, 256, dtype=torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"expected \(1, 2\)"):
        dequantize_fp8_blocks(weight, torch.ones(2, 2), torch.float32)
    with pytest.raises(ModelError, match="float8_e5m2"):
        dequantize_fp8_blocks(weight.to(torch.float8_e5m2), torch.ones(1, 2), torch.float32)


SPEC = ExpertSpec(num_experts=3, hidden_size=8, intermediate_size=4)
GOOD = ExpertWeights(torch.zeros(3, 8, 8), torch.zeros(3, 8, 4))


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        (SPEC, replace(GOOD, gate_up=torch.zeros(3, 8, 7)), r"gate_up has shape \(3, 8, 7\)"),
        (SPEC, replace(GOOD, down=torch.zeros(2, 8, 4)), r"down has shape \(2, 8, 4\)"),
        (SPEC, replace(GOOD, down_bias=torch.zeros(3, 8)), "down_bias"),
        (replace(SPEC, bias=True), GOOD, "gate_up_bias has shape None"),
        (SPEC, replace(GOOD, gate_up=torch.zeros(3, 8, 8).half()), "gate_up is torch.float16"),
        (SPEC, ExpertWeights(GOOD.gate_up.int(), GOOD.down.int()), "allowed: torch.float32"),
    ],
)
def test_weights_that_do_not_fit_the_spec(
    spec: ExpertSpec, weights: ExpertWeights, message: str
) -> None:
    check_expert_weights(SPEC, GOOD, layer=7)
    with pytest.raises(ModelError, match=f"layer 7.*{message}"):
        check_expert_weights(spec, weights, layer=7)
