"""The resident form of expert weights, and pure conversions into it from what checkpoints hold.

No function here reads a file or keeps state; the loader applies them to tensors as it reads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeserve.core import ExpertSpec, ExpertWeights, ModelError
from moeserve.cpu_backend.packing import PackedExperts

__all__ = [
    "ExpertSpec",
    "ExpertWeights",
    "check_expert_weights",
    "deinterleave_gate_up",
    "dequantize_fp8_blocks",
    "dequantize_mxfp4",
    "interleave_gate_up",
    "pack_gate_up",
    "stack_experts",
    "transpose_experts",
    "unpack_gate_up",
]

#: 32 values of 4 bits
MXFP4_BLOCK_BYTES = 16
DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: e2m1: the values of a 4-bit float without its sign, which is the highest bit
#: (OCP Microscaling Formats v1.0, section 5.3.3)
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: e8m0: the exponent bias of a block's scale (ibid., section 5.4.1)
E8M0_BIAS = 127


def check_expert_weights(
    spec: ExpertSpec, weights: ExpertWeights | PackedExperts, layer: int
) -> None:
    """ModelError, naming layer, tensor and shape, unless the weights are what the spec says."""
    if isinstance(weights, PackedExperts):
        assert weights.spec == spec, "packed experts are made from the spec"
        return
    experts, hidden, inner = spec.num_experts, spec.hidden_size, spec.intermediate_size
    expected: dict[str, tuple[Tensor | None, tuple[int, ...] | None]] = {
        "gate_up": (weights.gate_up, (experts, 2 * inner, hidden)),
        "down": (weights.down, (experts, hidden, inner)),
        "gate_up_bias": (weights.gate_up_bias, (experts, 2 * inner) if spec.bias else None),
        "down_bias": (weights.down_bias, (experts, hidden) if spec.bias else None),
    }
    for name, (tensor, shape) in expected.items():
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            message = f"layer {layer}: experts' {name} has shape {found}, expected {shape}"
            raise ModelError(message, field=name)
        if tensor is not None and tensor.dtype is not weights.down.dtype:
            message = f"layer {layer}: experts' {name} is {tensor.dtype}, down {weights.down.dtype}"
            raise ModelError(message, field=name)
    if weights.down.dtype not in DENSE_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DENSE_DTYPES)
        raise ModelError(f"layer {layer}: experts are {weights.down.dtype}; allowed: {allowed}")


def pack_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: [..., I, H] (or biases, [..., I] with a last axis added) to [..., 2I, H]."""
    return torch.cat((gate, up), dim=-2)


def unpack_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 2I, H] to gate and up, [..., I, H] each; views."""
    gate, up = gate_up.chunk(2, dim=-2)
    return gate, up


def stack_experts(experts: Sequence[Tensor]) -> Tensor:
    """One tensor per expert, in order, to one tensor with a leading axis of experts."""
    return torch.stack(tuple(experts))


def transpose_experts(weight: Tensor) -> Tensor:
    """[..., in, out] (gpt-oss stores x @ W) to [..., out, in], contiguous; its own inverse."""
    return weight.transpose(-2, -1).contiguous()


def deinterleave_gate_up(interleaved: Tensor, dim: int) -> Tensor:
    """gate0, up0, gate1, up1, ... along `dim` (2I long) to all of gate, then all of up."""
    dim %= interleaved.dim()
    return torch.unflatten(interleaved, dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def interleave_gate_up(gate_up: Tensor, dim: int) -> Tensor:
    """The inverse of `deinterleave_gate_up`."""
    dim %= gate_up.dim()
    return torch.unflatten(gate_up, dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """MXFP4 to dense: blocks [..., G, 16] and scales [..., G], both uint8, to [..., 32 * G].

    A block is 32 values of 4 bits (e2m1), the lower half of a byte first, times the power of two
    that its scale names (e8m0). The last axis is the one that products sum over, so the rows come
    out as [out, in] without a transposition. Raises ModelError on other types or shapes.
    """
    if blocks.dtype is not torch.uint8 or scales.dtype is not torch.uint8:
        raise ModelError(f"mxfp4: blocks {blocks.dtype}, scales {scales.dtype}; both must be uint8")
    if (
        blocks.dim() < 2
        or blocks.shape[-1] != MXFP4_BLOCK_BYTES
        or blocks.shape[:-1] != scales.shape
    ):
        shapes = f"blocks {tuple(blocks.shape)}, scales {tuple(scales.shape)}"
        raise ModelError(f"mxfp4: {shapes}; expected [..., G, {MXFP4_BLOCK_BYTES}] and [..., G]")
    fp4 = torch.tensor(FP4_VALUES + tuple(-v for v in FP4_VALUES), device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    both_halves = torch.stack((fp4[byte & 15], fp4[byte >> 4]), dim=-1)  # [256, 2] float32
    dense = torch.empty((*scales.shape, 2 * MXFP4_BLOCK_BYTES), dtype=dtype, device=blocks.device)
    # One leading slice (an expert) at a time: the float32 in between is four times the result.
    whole = blocks.dim() < 4
    parts = [(blocks, scales, dense)] if whole else zip(blocks, scales, dense, strict=True)
    for block, scale, target in parts:
        values = both_halves[block.int()].flatten(-2)  # [..., G, 32]
        target.copy_(torch.ldexp(values, scale.int().unsqueeze(-1) - E8M0_BIAS))
    return dense.flatten(-2)


def dequantize_fp8_blocks(
    weight: Tensor, scale_inv: Tensor, dtype: torch.dtype, block_size: tuple[int, int] = (128, 128)
) -> Tensor:
    """Block-scaled fp8 to dense: weight [..., N, K] e4m3 times its block's scale, [..., N, K].

    scale_inv: [..., ceil(N / 128), ceil(K / 128)] float32; blocks at the edges may be cut off.
    DeepSeek-V3 (arXiv 2412.19437, section 3.3.2), checkpoint tensors `weight_scale_inv`.
    Raises ModelError on another type or shape.
    """
    if weight.dtype is not torch.float8_e4m3fn:
        raise ModelError(f"fp8: weight is {weight.dtype}; only float8_e4m3fn is implemented")
    rows, columns = weight.shape[-2:]
    expected = (*weight.shape[:-2], -(-rows // block_size[0]), -(-columns // block_size[1]))
    if tuple(scale_inv.shape) != expected:
        raise ModelError(f"fp8: scales {tuple(scale_inv.shape)}, expected {expected}")
    scale = scale_inv.float().repeat_interleave(block_size[0], dim=-2)[..., :rows, :]
    dense = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for start in range(0, columns, block_size[1]):
        span = slice(start, start + block_size[1])
        column_scale = scale[..., start // block_size[1], None]  # [..., N, 1]
        dense[..., span] = weight[..., span].float() * column_scale
    return dense
