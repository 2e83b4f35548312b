"""Weights that were packed for the CPU's kernels, as tensors of a device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from moeserve.core import ModelError
from moeserve.cpu_backend.packing import PackedExperts, PackedWeight
from moeserve.experts.device.packed_tensors import PackedMatrices, Unpacked, matrices_of
from moeserve.models.targets import EMBEDDING, HEAD, Weight


def on_device(
    weights: Mapping[str, Weight],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    tied_head: bool,
) -> dict[str, Weight]:
    """All but the routed experts as plain tensors on the device, the experts as they are.

    dtypes: that those which were packed get there, by name. tied_head: the embedding is the
    head, too; one tensor is both, unless the head was rounded to fewer bits, so that the same model
    says the same there. Raises ModelError where the device has no room.
    """
    found: dict[str, Weight] = {}
    head = weights[HEAD]
    exact = isinstance(head, PackedWeight) and head.form.name in ("float32", "bfloat16")
    shared = tied_head and exact
    for name, weight in weights.items():
        if ".experts." in name:
            found[name] = weight
            continue
        if shared and name == HEAD:
            continue
        try:
            found[name] = _tensor(name, weight, dtypes[name], device)
        except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, a plain one on the CPU
            raise ModelError(
                f"{name}: no memory on {device}: {error}",
                hint="lower --device-memory, whose slots are there already",
            ) from error
    if shared:
        found[HEAD] = found[EMBEDDING]
    return found


def _tensor(name: str, weight: Weight, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.to(device)
    if isinstance(weight, PackedWeight):
        matrix = PackedMatrices(weight.layout, 0, weight.layout.rows)
        return _numbers(matrix, weight.data, dtype, device).view(weight.shape)
    return _of_ffn(name, weight, dtype, device)


def _of_ffn(name: str, ffn: PackedExperts, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a dense FFN's record holds under that name: gate_up or down, weight or bias."""
    *_, which, kind = name.split(".")
    gate_up, down = matrices_of(ffn)
    first = which == "gate_up"
    matrix = gate_up if first else down
    (record,) = ffn.records
    if kind == "weight":
        return _numbers(matrix, record, dtype, device)
    start = ffn.native.gate_up_bias_offset if first else ffn.native.down_bias_offset
    rows = ffn.gate_up_layout.rows if first else ffn.spec.hidden_size
    numbers = torch.from_numpy(np.array(record[start : start + 4 * rows])).view(torch.float32)
    return (matrix.vectors(numbers[None])[0] if first else numbers).to(device, dtype)


def _numbers(
    matrix: PackedMatrices, data: np.ndarray, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[N, K]. The bytes go to the device, and become numbers there."""
    stored = torch.from_numpy(np.array(data))[None].to(device)
    found: Unpacked = matrix.unpack(stored, dtype)
    if found.scales is None:
        return found.values[0].contiguous()
    return (found.values[0].float() * found.scales[0, :, None]).to(dtype)
