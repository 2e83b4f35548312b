"""Does an ISA level compute what plain C++ computes? Asked before a level is used.

A level is built on machines that cannot run it, so a mistake in one of the rarer ones (AMX, bf16
instructions) may meet its first CPU at a user's. A few small products in every format, with the odd
sizes that kernels get wrong, take some milliseconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeserve.cpu_backend import _native
from moeserve.cpu_backend.packing import PackFormat

#: outputs, inputs: whole and cut-off panels, chunks, groups and tiles
SHAPES = ((16, 64), (70, 203), (33, 384))
ROWS = (1, 3, 17, 33)
#: one of each way to compute
FORMATS = (
    PackFormat("float32"),
    PackFormat("bfloat16"),
    PackFormat("int8"),
    PackFormat("int8", weight_only=True),
    PackFormat("int4", 32),
    PackFormat("int4", 64, zero_points=True),
    PackFormat("int4", 32, zero_points=True, weight_only=True),
    PackFormat("mxfp4"),
    PackFormat("mxfp4", weight_only=True),
    PackFormat("fp8"),
)
#: of the largest output. Levels add in the same order; fused and unfused, bf16 pairs and single
#: products differ in rounding only, and rows go through bf16 on a level that has such products.
TOLERANCE = 1e-5
BF16_ROWS_TOLERANCE = 1e-2


def wrong_products(name: str) -> list[str]:
    """What the level called `name` gets wrong, in words; empty where all is well."""
    generator = np.random.default_rng(0)
    level = _native.Runtime(name, 1)
    plain = _native.Runtime("scalar", 1)
    wrong: list[str] = []
    for outputs, inputs in SHAPES:
        for form in FORMATS:
            cols = inputs // 32 * 32 if form.name == "mxfp4" else inputs  # it comes in blocks of 32
            x = generator.standard_normal((max(ROWS), cols), dtype=np.float32)
            matrix = _random_matrix(plain, form, outputs, cols, generator)
            limit = BF16_ROWS_TOLERANCE if form.name == "bfloat16" else TOLERANCE
            for rows in ROWS:
                error = _difference(matrix, level, plain, x[:rows], outputs)
                if not error <= limit:  # NaN is wrong, too
                    shape = f"[{outputs}, {cols}], {rows} rows"
                    wrong.append(f"{form.describe()}, {shape}: {error:.1e}")
    return wrong


def _random_matrix(
    runtime: _native.Runtime,
    form: PackFormat,
    outputs: int,
    cols: int,
    generator: np.random.Generator,
) -> _native.PackedMatrix:
    layout = form.layout(outputs, cols)
    data = _native.allocate(layout.num_bytes)
    rows = np.arange(outputs)
    if form.name == "mxfp4":
        codes = generator.integers(0, 256, (outputs, cols // 2), dtype=np.uint8)
        exponents = generator.integers(122, 130, (outputs, cols // 32), dtype=np.uint8)
        _native.pack_codes(runtime, layout, data, rows, codes, exponents)
    elif form.name == "fp8":
        magnitudes = generator.integers(0, 0x50, (outputs, cols), dtype=np.uint8)  # below 8
        signs = generator.integers(0, 2, (outputs, cols), dtype=np.uint8) << 7
        scales = generator.random((outputs, -(-cols // 128)), dtype=np.float32) + 0.1
        _native.pack_codes(runtime, layout, data, rows, magnitudes | signs, scales)
    else:
        weight = generator.standard_normal((outputs, cols), dtype=np.float32)
        _native.pack(runtime, layout, data, rows, weight)
    return _native.PackedMatrix(layout, data)


def _difference(
    matrix: _native.PackedMatrix,
    level: _native.Runtime,
    plain: _native.Runtime,
    x: NDArray[np.float32],
    outputs: int,
) -> float:
    """The largest difference of both results over the largest number expected."""
    found = np.full((len(x), outputs), np.nan, dtype=np.float32)
    expected = np.empty_like(found)
    matrix.run(level, x, found)
    matrix.run(plain, x, expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())
