"""Does an ISA level compute what plain C++ computes? Asked before a level is used.

A level's file can be built on a machine that cannot run it, so a mistake in one of the rarer levels
A level is built on machines that cannot run it, so a mistake in one of the rarer ones (AMX, bf16
instructions) may meet its first CPU at a user's. A few small products, with the odd sizes that
kernels get wrong, take some milliseconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeserve.cpu_backend import _native

#: outputs, inputs: whole and cut-off panels, chunks, groups and tiles
SHAPES = ((16, 64), (70, 203), (33, 384))
ROWS = (1, 3, 17, 33)
#: format of packed.h, group, zero points, weight only
FORMATS = (
    (0, 0, False, False),
    (1, 0, False, False),
    (2, 0, False, False),
    (2, 0, False, True),
    (3, 32, False, False),
    (3, 64, True, False),
    (3, 32, True, True),
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
        weight = generator.standard_normal((outputs, inputs), dtype=np.float32)
        x = generator.standard_normal((max(ROWS), inputs), dtype=np.float32)
        for kind in FORMATS:
            layout = _native.Layout(kind[0], outputs, inputs, *kind[1:])
            data = _native.allocate(layout.num_bytes)
            _native.pack(plain, layout, data, np.arange(outputs), weight)
            matrix = _native.PackedMatrix(layout, data)
            limit = BF16_ROWS_TOLERANCE if kind[0] == 1 else TOLERANCE
            for rows in ROWS:
                error = _difference(matrix, level, plain, x[:rows], outputs)
                if not error <= limit:  # NaN is wrong, too
                    wrong.append(f"format {kind}, [{outputs}, {inputs}], {rows} rows: {error:.1e}")
    return wrong


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
