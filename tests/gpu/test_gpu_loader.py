"""Weights arrive on the device as they arrive on the CPU, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moeserve.core import ModelError
from moeserve.experts.weights import dequantize_mxfp4
from moeserve.models import loader
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.loader import load_weights
from moeserve.models.weight_map import Part, WeightRule, transpose, whole

pytestmark = pytest.mark.gpu

EXPERTS, INNER, HIDDEN = 4, 96, 64


def mxfp4(sources: Sequence[Tensor]) -> Tensor:
    return dequantize_mxfp4(sources[0], sources[1], torch.float32)


def rules() -> list[WeightRule]:
    packed = (EXPERTS, HIDDEN, INNER)
    blocks, scales = (EXPERTS, INNER, HIDDEN // 32, 16), (EXPERTS, INNER, HIDDEN // 32)
    each = range(EXPERTS)
    return [
        whole("plain", "plain", (300, 70)),
        WeightRule(
            "turned",
            (EXPERTS, INNER, HIDDEN),
            tuple(Part(("packed",), (packed,), (e,), (e,), transpose) for e in each),
        ),
        WeightRule(
            "mxfp4",
            (EXPERTS, INNER, HIDDEN),
            tuple(Part(("blocks", "scales"), (blocks, scales), (e,), (e,), mxfp4) for e in each),
        ),
    ]


def tensors() -> dict[str, Tensor]:
    return {
        "plain": torch.randn(300, 70),
        "packed": torch.randn(EXPERTS, HIDDEN, INNER),
        "blocks": torch.randint(0, 256, (EXPERTS, INNER, HIDDEN // 32, 16), dtype=torch.uint8),
        "scales": torch.randint(110, 135, (EXPERTS, INNER, HIDDEN // 32), dtype=torch.uint8),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece_bytes", [1000, 1 << 26])
def test_equal_to_the_cpu(
    dtype: torch.dtype,
    piece_bytes: int,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "PIECE_BYTES", piece_bytes)
    save_file(tensors(), tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    there = load_weights(checkpoint, rules(), dtype=dtype, device=device, check_weights=True)
    here = load_weights(checkpoint, rules(), dtype=dtype, device=torch.device("cpu"))
    for name, expected in here.items():
        assert there[name].device.type == device.type
        assert torch.equal(there[name].cpu(), expected), name


def test_nan_is_found_on_the_device(device: torch.device, tmp_path: Path) -> None:
    sick = tensors()
    sick["plain"][3, 4] = float("nan")
    save_file(sick, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ModelError, match="plain: 1 NaN, 0 Inf"):
        load_weights(checkpoint, rules(), dtype=torch.float32, device=device, check_weights=True)


def test_a_model_larger_than_the_device_is_refused(device: torch.device, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    huge = (2**40, 2**16)
    part = Part(("a",), ((1,),), convert=lambda sources: sources[0].expand(huge))
    with pytest.raises(ModelError, match=f"w: no memory on {device}"):
        load_weights(
            Checkpoint.open(tmp_path),
            [WeightRule("w", huge, (part,))],
            dtype=torch.float32,
            device=device,
        )
