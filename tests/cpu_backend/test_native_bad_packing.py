"""What packing refuses, each with the argument's name."""

from __future__ import annotations

import pytest
import torch
from support.native_arguments import (
    DATA,
    FP8,
    FP8_DATA,
    INT8,
    MXFP4,
    MXFP4_DATA,
    Settings,
    bytes_of,
)
from support.native_matrices import runtime
from torch import Tensor

from moeserve.cpu_backend import _native as native

ODD_MXFP4 = (4, 4, 40)
IDS, X = torch.arange(20), torch.zeros(20, 33)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((6, 4, 4), "format: 6 is none"),
        ((-1, 4, 4), "format: -1 is none"),
        ((0, 0, 4), r"shape: \[0, 4\]"),
        ((0, 4, 0), r"shape: \[4, 0\]"),
        ((0, -5, 4), r"shape: \[-5, 4\]"),
        ((0, 2**30 + 1, 4), "rows must be 1 to 2"),
        ((0, 4, 2**24 + 1), "columns 1 to 2"),
        ((2, 4, 65537), "int8: 65537 inputs; at most 65536"),
        ((3, 4, 65537, 32), "int4 without zero points: 65537 inputs; at most 65536"),
        ((3, 4, 4, 0), "group: 0; int4 takes 32, 64 or 128"),
        ((3, 4, 4, 33), "group: 33"),
        ((2, 4, 4, 0, True), "asymmetric: only int4"),
    ],
)
def test_layouts(settings: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.Layout(*settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FP8, DATA, IDS, X), "layout: numbers are not packed into mxfp4 or fp8"),
        ((INT8, DATA, IDS, X.double()), "source: must be float32, bfloat16 or float16"),
        ((INT8, DATA, IDS, X[:, :30]), r"source: shape \[20, 30\], expected \[rows, 33\]"),
        ((INT8, DATA, IDS, X[0]), r"source: shape \[33\]"),
        ((INT8, DATA, IDS, torch.zeros(33, 20).T), "source: its rows are not contiguous"),
        ((INT8, DATA, IDS, torch.zeros(1, 33).expand(20, 33)), "source: its rows overlap"),
        ((INT8, DATA.view(torch.int8), IDS, X), "data: must be uint8"),
        ((INT8, DATA[:-1], IDS, X), r"data: shape \[\d+\], expected"),
        ((INT8, DATA.expand(2, -1), IDS, X), "data: is not contiguous"),
        ((INT8, DATA, IDS.int(), X), "row_ids: must be int64"),
        ((INT8, DATA, IDS[:-1], X), r"row_ids: shape \[19\], expected \[20\]"),
        ((INT8, DATA, torch.zeros(40, dtype=torch.int64)[::2], X), "row_ids: is not contiguous"),
        ((INT8, DATA, IDS - 1, X), r"row_ids: -1 is not within 0..31"),
        ((INT8, DATA, IDS + 13, X), "row_ids: 32 is not within 0..31"),
    ],
)
def test_pack(arguments: tuple[Settings, Tensor, Tensor, Tensor], message: str) -> None:
    settings, *arrays = arguments
    with pytest.raises(ValueError, match=message):
        native.pack(runtime("scalar"), native.Layout(*settings), *arrays)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((INT8, DATA, bytes_of(4, 33), bytes_of(4, 1)), "layout: codes are mxfp4 or fp8"),
        (
            (ODD_MXFP4, MXFP4_DATA, bytes_of(4, 20), bytes_of(4, 2)),
            "layout: mxfp4 comes in blocks of 32",
        ),
        ((FP8, FP8_DATA, bytes_of(4, 130).char(), torch.ones(4, 2)), "codes: must be uint8"),
        ((FP8, FP8_DATA, bytes_of(4, 65), torch.ones(4, 2)), r"codes: shape \[4, 65\]"),
        ((FP8, FP8_DATA, bytes_of(4, 130), torch.ones(4, 1)), r"scales: shape \[4, 1\]"),
        ((FP8, FP8_DATA, bytes_of(4, 130), bytes_of(4, 2)), "scales: must be float32"),
        ((MXFP4, MXFP4_DATA, bytes_of(4, 64), bytes_of(4, 2)), r"codes: shape \[4, 64\]"),
        ((MXFP4, MXFP4_DATA, bytes_of(4, 32), bytes_of(3, 2)), r"scales: shape \[3, 2\]"),
        ((MXFP4, MXFP4_DATA, bytes_of(4, 32), torch.ones(4, 2)), "scales: must be uint8"),
    ],
)
def test_pack_codes(arguments: tuple[Settings, Tensor, Tensor, Tensor], message: str) -> None:
    settings, data, *codes = arguments
    with pytest.raises(ValueError, match=message):
        native.pack_codes(
            runtime("scalar"), native.Layout(*settings), data, torch.arange(4), *codes
        )


@pytest.mark.parametrize(
    ("data", "out", "message"),
    [
        (DATA.char(), X, "data: must be uint8"),
        (DATA[:-1], X, "data: shape"),
        (DATA, X.half(), "out: must be float32"),
        (DATA, X[:19], r"out: shape \[19, 33\], expected \[20, 33\]"),
        (DATA, torch.zeros(20, 40)[:, :33], "out: is not contiguous"),
    ],
)
def test_unpack(data: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.unpack(native.Layout(*INT8), data, out)
