"""Packed matrices read by torch, against the native kernels' own reading of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.packed_numbers import FORMS, cols_of, fill, numbers
from support.randomness import fresh_generators

from moeserve.core import ExpertSpec
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackedWeight, PackFormat
from moeserve.experts.device.packed_tensors import PackedMatrices, matrices_of


@pytest.mark.parametrize("form", FORMS, ids=PackFormat.describe)
def test_a_matrix_is_read_as_the_kernels_read_it(form: PackFormat) -> None:
    rng, generator = fresh_generators()
    native = NativeRuntime(1)
    for _ in range(5):
        rows, cols = rng.randint(1, 70), cols_of(form, rng)
        stored = [PackedWeight(native.handle, (rows, cols), form) for _ in range(3)]
        for each in stored:
            fill(each, generator)
        offset = 64 * rng.randint(0, 3)  # of a record that has other things before and behind
        records = torch.zeros(3, offset + stored[0].nbytes + 64, dtype=torch.uint8)
        for record, each in zip(records, stored, strict=True):
            record[offset : offset + each.nbytes] = torch.from_numpy(each.data)
        found = PackedMatrices(stored[0].layout, offset, rows).unpack(records, torch.float32)
        expected = torch.stack([each.numbers() for each in stored])
        assert found.values.shape == (3, rows, cols)
        torch.testing.assert_close(numbers(found).float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS, ids=PackFormat.describe)
def test_codes_are_exact_in_bfloat16(form: PackFormat) -> None:
    """Where a format has one scale for an output, it is not rounded into the weights."""
    rng, generator = fresh_generators()
    native = NativeRuntime(1)
    stored = PackedWeight(native.handle, (40, cols_of(form, rng)), form)
    fill(stored, generator)
    matrix = PackedMatrices(stored.layout, 0, 40)
    found = matrix.unpack(torch.from_numpy(stored.data)[None], torch.bfloat16)
    exact = matrix.unpack(torch.from_numpy(stored.data)[None], torch.float32)
    assert found.values.dtype is torch.bfloat16
    if found.scales is not None or form.name in ("bfloat16", "mxfp4"):
        assert torch.equal(found.values.float(), exact.values)
    else:
        torch.testing.assert_close(found.values.float(), exact.values, rtol=2**-8, atol=0)


@pytest.mark.parametrize("form", FORMS, ids=PackFormat.describe)
def test_matrices_of_experts(form: PackFormat) -> None:
    """Gate above up, as they were put, although their panels take turns in a record."""
    rng, generator = fresh_generators()
    native = NativeRuntime(1)
    sizes = (32 * rng.randint(1, 4), 32 * rng.randint(1, 4))
    hidden, inner = sizes if form.name == "mxfp4" else (rng.randint(1, 90), rng.randint(1, 90))
    spec = ExpertSpec(num_experts=3, hidden_size=hidden, intermediate_size=inner, bias=True)
    packed = PackedExperts(native.handle, spec, form)
    gate_up = PackedWeight(native.handle, (2 * inner, hidden), form)
    down = PackedWeight(native.handle, (hidden, inner), form)
    gate_up_bias = torch.randn(3, 2 * inner, generator=generator)
    down_bias = torch.randn(3, hidden, generator=generator)
    packed.put_biases(gate_up_bias, down_bias)
    expected = []
    for expert in range(3):
        for each in (gate_up, down):
            fill(each, generator)
        whole = [each.numbers() for each in (gate_up, down)]
        rows = [torch.arange(2 * inner), torch.arange(hidden)]
        if form.holds_codes:
            plain = replace(spec, num_experts=1)
            floats = PackedExperts(native.handle, plain, PackFormat("float32"))
            floats.put_gate_up(0, rows[0], whole[0])
            floats.put_down(0, rows[1], whole[1])
            found = matrices_of(floats)
            record = torch.from_numpy(floats.records)
            assert torch.equal(found[0].unpack(record, torch.float32).values[0], whole[0])
            assert torch.equal(found[1].unpack(record, torch.float32).values[0], whole[1])
            continue
        packed.put_gate_up(expert, rows[0], whole[0])
        packed.put_down(expert, rows[1], whole[1])
        gate_up.put(rows[0], whole[0])
        down.put(rows[1], whole[1])
        expected.append([each.numbers() for each in (gate_up, down)])
    records = torch.from_numpy(packed.records)
    for number, matrix in enumerate(matrices_of(packed)):
        found_numbers = numbers(matrix.unpack(records, torch.float32)).float()
        for expert, numbers_of in enumerate(expected):
            torch.testing.assert_close(found_numbers[expert], numbers_of[number], rtol=1e-6, atol=0)
