"""Arguments for what the native module must refuse, or survive."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.cpu_backend import _native as native

Settings = tuple[int, int, int]  # of a Layout: format, rows, columns

INT8, FP8, MXFP4 = (2, 20, 33), (5, 4, 130), (4, 4, 64)


def empty_data(settings: Settings) -> Tensor:
    return torch.zeros(native.Layout(*settings).num_bytes, dtype=torch.uint8)


DATA, FP8_DATA, MXFP4_DATA = empty_data(INT8), empty_data(FP8), empty_data(MXFP4)


def int8_matrix(data: Tensor = DATA, bias: Tensor | None = None) -> native.PackedMatrix:
    return native.PackedMatrix(native.Layout(*INT8), data, bias)


def bytes_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)
