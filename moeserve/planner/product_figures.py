"""Figures of linear layers: one product after the other, each with weights that no cache holds.

Also of the ups of latent attention (models/attention.py), which torch multiplies head by head.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Protocol

import torch

from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_linear import NativeLinear
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedWeight, PackFormat
from moeserve.models.layers import per_head_into
from moeserve.planner.repeats import MOST_TOGETHER, Measurement, usual
from moeserve.planner.step_costs import PER_HEAD

#: outputs and inputs of the measured matrices: as of attention in mid-size models
SIZE = (2048, 2048)
#: of others, by which it is known what rows cost beside weights (schedule/product_sizes.py)
SMALL_SIZE = (512, 512)
#: products that are timed together, as the matrices of layers follow each other
TOGETHER = 4
#: formats that linear layers are rounded to; codes of checkpoints cost as their experts do
PRODUCT_FORMATS = ("float32", "bfloat16", "int8", "int4")
#: what latent attention computes in
PER_HEAD_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: heads, numbers of a key without its rotated part, of a latent: as of DeepSeek-V2-Lite
HEADS = (16, 128, 512)


class Pool(Protocol):
    """Products with weights of one kind, that take turns."""

    def ps(self, num_rows: int) -> float:
        """Of one product of so many rows, for each weight, in picoseconds."""
        ...

    def of_rows(self, num_rows: int) -> Measurement:
        """The same, to be measured until it is known."""
        ...


@dataclass(frozen=True)
class Kind:
    """weights: `ProductCurve.weights`. outputs, inputs: of one matrix."""

    weights: str
    outputs: int
    inputs: int


def product_pools(
    runtime: NativeRuntime,
    forms: Sequence[PackFormat],
    pool_bytes: int,
    size: tuple[int, int] = SIZE,
) -> dict[Kind, Pool]:
    """Linear layers of each format that they have, among `forms`."""
    return {
        Kind(form.describe(), *size): ProductPool(runtime, form, size, pool_bytes)
        for form in dict.fromkeys(forms)
        if form.name in PRODUCT_FORMATS
    }


def per_head_pools(forms: Sequence[PackFormat], pool_bytes: int) -> dict[Kind, Pool]:
    """The ups of latent attention in what it computes in, among `forms`."""
    names = {form.name for form in forms}
    return {
        Kind(f"{name} {PER_HEAD}", *HEADS[1:]): PerHeadPool(dtype, pool_bytes)
        for name, dtype in PER_HEAD_DTYPES.items()
        if name in names
    }


class ProductPool:
    """Linear layers with the same numbers, each at its own place in memory, that take turns."""

    def __init__(
        self, runtime: NativeRuntime, form: PackFormat, size: tuple[int, int], pool_bytes: int
    ) -> None:
        """size: outputs and inputs. pool_bytes: at most, where a turn reads less."""
        outputs, inputs = size
        generator = torch.Generator().manual_seed(0)
        first = PackedWeight(runtime.handle, size, form)
        numbers = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        first.put(torch.arange(outputs), numbers)
        most = (1 + TOGETHER) * MOST_TOGETHER
        count = max(TOGETHER, min(most, pool_bytes // first.nbytes))
        # In one piece, so that small ones stand in huge pages too, as a model's do.
        memory = _native.allocate(count * first.nbytes).reshape(count, first.nbytes)
        memory[:] = first.data
        weights = [PackedWeight(runtime.handle, size, form, data) for data in memory]
        self._matrices = [NativeLinear(weight).matrix for weight in weights]
        self._turns = cycle(self._matrices)
        self._runtime = runtime.handle
        self._outputs, self._inputs = size
        self._num_weights = outputs * inputs
        self._dtype = torch.float32 if form.name == "float32" else torch.bfloat16

    def of_rows(self, num_rows: int) -> Measurement:
        return usual(partial(self.ps, num_rows))

    def read_once(self) -> None:
        """All of it: memory that was just written is read slower the first time."""
        for _ in range(0, len(self._matrices), TOGETHER):
            self.ps(1)

    def ps(self, num_rows: int) -> float:
        """Of a few products one after the other, for each weight, in picoseconds. Behind another,
        as in a step: the threads are awake, and sums have memory that was written before."""
        x = torch.randn(num_rows, self._inputs).to(self._dtype)
        out = torch.empty(num_rows, self._outputs, dtype=self._dtype)
        next(self._turns).run(self._runtime, x, out)
        matrices = [next(self._turns) for _ in range(TOGETHER)]
        started_s = time.perf_counter()
        for matrix in matrices:
            matrix.run(self._runtime, x, out)
        return (time.perf_counter() - started_s) * 1e12 / (TOGETHER * self._num_weights)


class PerHeadPool:
    """The two ups of latent attention, with the same numbers, each at its own place in memory."""

    def __init__(self, dtype: torch.dtype, pool_bytes: int) -> None:
        heads, key, latent = HEADS
        generator = torch.Generator().manual_seed(0)
        one = torch.randn(heads, key, latent, generator=generator).div(key**0.5).to(dtype)
        count = max(TOGETHER, pool_bytes // one.nbytes) // 2
        self._turns = cycle(
            [w for _ in range(count) for w in (one.clone(), one.transpose(1, 2).contiguous())]
        )
        self._dtype = dtype

    def of_rows(self, num_rows: int) -> Measurement:
        return usual(partial(self.ps, num_rows))

    def ps(self, num_rows: int) -> float:
        """Of both, on one thread of torch's (see `calibrate`)."""
        heads, key, latent = HEADS
        x = torch.randn(num_rows, heads, key).to(self._dtype)
        wide = torch.empty(num_rows, heads, latent, dtype=self._dtype)
        out = torch.empty_like(x)
        key_up, value_up = next(self._turns), next(self._turns)
        started_s = time.perf_counter()
        with torch.inference_mode():
            per_head_into(wide, x, key_up)
            per_head_into(out, wide, value_up)
        return (time.perf_counter() - started_s) * 1e12 / (2 * key_up.numel())
