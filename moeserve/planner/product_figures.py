"""Figures of linear layers: one product after the other, each with weights that no cache holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import cycle

import torch

from moeserve.cpu_backend.native_linear import NativeLinear
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedWeight, PackFormat
from moeserve.planner.repeats import Measurement, timed

#: rows and columns of the measured matrices: as of attention in mid-size models
SIZE = 2048
#: products that are timed together, as the matrices of layers follow each other
TOGETHER = 4
#: formats that linear layers are rounded to; codes of checkpoints cost as their experts do
PRODUCT_FORMATS = ("float32", "bfloat16", "int8", "int4")


def product_pools(
    runtime: NativeRuntime, forms: Sequence[PackFormat], pool_bytes: int, size: int = SIZE
) -> dict[str, ProductPool]:
    """For each format of linear layers among `forms`, by its description."""
    return {
        form.describe(): ProductPool(runtime, form, size, pool_bytes)
        for form in dict.fromkeys(forms)
        if form.name in PRODUCT_FORMATS
    }


class ProductPool:
    """Linear layers with the same numbers, each at its own place in memory, that take turns."""

    def __init__(
        self, runtime: NativeRuntime, form: PackFormat, size: int, pool_bytes: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        first = PackedWeight(runtime.handle, (size, size), form)
        first.put(torch.arange(size), torch.randn(size, size, generator=generator) / size**0.5)
        count = max(TOGETHER, pool_bytes // first.nbytes)
        weights = [first] + [
            PackedWeight(runtime.handle, (size, size), form, first.data.copy())
            for _ in range(count - 1)
        ]
        self._turns = cycle([NativeLinear(weight) for weight in weights])
        self._size = size
        self._dtype = torch.float32 if form.name == "float32" else torch.bfloat16

    def of_rows(self, num_rows: int) -> Measurement:
        return timed(partial(self.ps, num_rows))

    def ps(self, num_rows: int) -> float:
        """Of a few products one after the other, for each weight, in picoseconds."""
        x = torch.randn(num_rows, self._size).to(self._dtype)
        layers = [next(self._turns) for _ in range(TOGETHER)]
        started_s = time.perf_counter()
        for layer in layers:
            layer(x)
        return (time.perf_counter() - started_s) * 1e12 / (TOGETHER * self._size**2)
