"""Packed matrices of random weights for tests of the native kernels, and what they should give."""

from __future__ import annotations

import atexit
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.cpu_backend import _native as native

F32_EPS = 2.0**-24


@dataclass(frozen=True)
class Kind:
    """A format with its settings. Numbers are those of `Format` in packed.h."""

    name: str
    number: int
    group_cols: int = 0
    asymmetric: bool = False
    weight_only: bool = False

    @property
    def is_codes(self) -> bool:
        """Packed from a checkpoint's codes, not from numbers."""
        return self.name.startswith(("mxfp4", "fp8"))

    @property
    def has_factors(self) -> bool:
        """A group's scale is a whole multiple of its output's."""
        return self.name.startswith("int4") and not self.asymmetric

    @property
    def quantises_rows(self) -> bool:
        """Activations become int8, one scale per row."""
        return self.name.startswith(("int", "mxfp4")) and not self.weight_only

    def layout(self, rows: int, cols: int) -> native.Layout:
        return native.Layout(
            self.number, rows, cols, self.group_cols, self.asymmetric, self.weight_only
        )


F32, BF16 = Kind("f32", 0), Kind("bf16", 1)
INT8, INT8_WO = Kind("int8", 2), Kind("int8 weight-only", 2, weight_only=True)
INT4 = [
    Kind(f"int4 {'asym' if asymmetric else 'sym'} {group}{' weight-only' if weight_only else ''}",
         3, group, asymmetric, weight_only)
    for group in (32, 64, 128) for asymmetric in (False, True) for weight_only in (False, True)
]  # fmt: skip
MXFP4, MXFP4_WO = Kind("mxfp4", 4), Kind("mxfp4 weight-only", 4, weight_only=True)
FP8 = Kind("fp8", 5)
KINDS = [F32, BF16, INT8, INT8_WO, *INT4, MXFP4, MXFP4_WO, FP8]
#: one of each way to compute
FEW_KINDS = [F32, BF16, INT8, INT8_WO, INT4[0], INT4[1], INT4[2], INT4[3], MXFP4, MXFP4_WO, FP8]

LEVELS = [level.name for level in native.isa_levels() if level.usable]
#: scalar_bf16 does what a level with bf16 products does, on any machine
TEST_LEVELS = [*LEVELS, "scalar_bf16"]


@functools.cache
def runtime(isa: str, num_threads: int = 1) -> native.Runtime:
    """Kept: a Runtime owns threads, and thousands of tests need one."""
    return native.Runtime(isa, num_threads)


atexit.register(runtime.cache_clear)  # nanobind reports what outlives the interpreter


@dataclass(frozen=True)
class Packed:
    """A packed matrix and the numbers that it stands for."""

    kind: Kind
    layout: native.Layout
    data: Tensor  # uint8
    dense: Tensor  # [N, K] float64

    def product(self, isa: str, x: Tensor, num_threads: int = 1) -> Tensor:
        """x [T, K] times the transposed matrix, by the kernels: [T, N] float32."""
        out = torch.full((x.shape[0], self.layout.rows), torch.nan)
        native.PackedMatrix(self.layout, self.data).run(runtime(isa, num_threads), x, out)
        return out


def allocate(num_bytes: int) -> Tensor:
    return torch.from_numpy(native.allocate(num_bytes))


def unpack(layout: native.Layout, data: Tensor) -> Tensor:
    out = torch.full((layout.rows, layout.cols), torch.nan)
    native.unpack(layout, data, out)
    return out


def pack_and_unpack(kind: Kind, weight: Tensor, isa: str = "scalar") -> Tensor:
    """What the packed weight [N, K] stands for."""
    layout = kind.layout(*weight.shape)
    data = allocate(layout.num_bytes)
    assert native.pack(runtime(isa, 2), layout, data, torch.arange(weight.shape[0]), weight)
    return unpack(layout, data)


def groups_of(x: Tensor, group_cols: int) -> Tensor:
    """[N, K] to [N, groups, group_cols], zeros behind."""
    padding = -x.shape[1] % group_cols
    return torch.nn.functional.pad(x, (0, padding)).unflatten(1, (-1, group_cols))


def random_codes(
    kind: Kind, rows: int, cols: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Codes and scales of mxfp4 or fp8, as checkpoints hold them: weights of about 1."""
    if kind.name.startswith("mxfp4"):
        codes = torch.randint(0, 256, (rows, cols // 2), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 130, (rows, cols // 32), generator=generator)
        return codes, scales.to(torch.uint8)
    codes = torch.randn(rows, cols, generator=generator).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), torch.rand(rows, -(-cols // 128), generator=generator) + 0.1


def usable_cols(kind: Kind, cols: int) -> int:
    """mxfp4 comes in whole blocks of 32."""
    return -(-cols // 32) * 32 if kind.name.startswith("mxfp4") else cols


def pack_random(kind: Kind, rows: int, cols: int, generator: torch.Generator) -> Packed:
    """A random matrix [rows, usable_cols(cols)]."""
    layout = kind.layout(rows, usable_cols(kind, cols))
    data = allocate(layout.num_bytes)
    row_ids = torch.arange(rows)
    if kind.is_codes:
        codes, scales = random_codes(kind, rows, layout.cols, generator)
        assert native.pack_codes(runtime("scalar"), layout, data, row_ids, codes, scales)
    else:
        weight = torch.randn(rows, layout.cols, generator=generator)
        assert native.pack(runtime("scalar"), layout, data, row_ids, weight)
    return Packed(kind, layout, data, unpack(layout, data).double())


def has_bf16_products(isa: str) -> bool:
    return isa in ("avx512_bf16", "amx", "scalar_bf16")


def quantised_rows(x: Tensor) -> Tensor:
    """x [T, K], each row rounded to 127 steps of its largest magnitude either way, as float64."""
    x = x.float()
    bound = x.abs().amax(dim=-1, keepdim=True)
    most = torch.full_like(bound, 127.0)  # as a tensor: torch divides a number by rounding twice
    inverse = torch.where(bound >= 2.0**-120, most / bound, 0.0)  # see quantize_row
    codes = (x * inverse).round()  # halves to even, as the instructions do
    return codes.double() * (bound / most).double()


def rows_as_used(kind: Kind, isa: str, x: Tensor) -> Tensor:
    """What the kernels of that level multiply weights of that kind with: [T, K] float64."""
    if kind.quantises_rows:
        return quantised_rows(x)
    if kind.name == "bf16" and has_bf16_products(isa):
        return x.bfloat16().double()
    return x.double()


def product_bound(packed: Packed, rows: Tensor) -> Tensor:
    """Rounding error of a product in float32: [T, N].

    A sum of n terms in any fixed order is off by at most n eps times the sum of magnitudes (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1), for n terms we have K products,
    the groups' scales, the row's scale and the weight as unpack rounded it.
    """
    terms = packed.layout.cols + packed.layout.num_groups + 6
    return 1.01 * terms * F32_EPS * (rows.abs() @ packed.dense.abs().T) + 1e-37
