"""Packed matrices of every format with random numbers, and what torch reads of them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from moeserve.cpu_backend.packing import PackedWeight, PackFormat
from moeserve.experts.device.packed_tensors import Unpacked

FORMS = (
    PackFormat("float32"),
    PackFormat("bfloat16"),
    PackFormat("int8"),
    *(PackFormat("int4", group, zeros) for group in (32, 64, 128) for zeros in (False, True)),
    PackFormat("mxfp4"),
    PackFormat("fp8"),
)


def fill(weight: PackedWeight, generator: torch.Generator) -> None:
    rows, cols = weight.layout.rows, weight.layout.cols
    ids = torch.arange(rows)
    if weight.form.name == "mxfp4":
        codes = torch.randint(0, 256, (rows, cols // 2), generator=generator, dtype=torch.uint8)
        scales = torch.randint(100, 140, (rows, cols // 32), generator=generator, dtype=torch.uint8)
        weight.put_codes(ids, codes, scales)
    elif weight.form.name == "fp8":
        numbers = torch.randn(rows, cols, generator=generator).to(torch.float8_e4m3fn)
        groups = -(-cols // 128)
        weight.put_codes(ids, numbers, torch.rand(rows, groups, generator=generator) + 0.1)
    else:
        weight.put(ids, torch.randn(rows, cols, generator=generator))


def numbers(found: Unpacked) -> Tensor:
    values = found.values.double()
    return values if found.scales is None else values * found.scales.double().unsqueeze(-1)


def cols_of(form: PackFormat, rng: random.Random) -> int:
    return 32 * rng.randint(1, 8) if form.name == "mxfp4" else rng.randint(1, 300)
