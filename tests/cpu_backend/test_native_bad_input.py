"""What the native module refuses, each with the argument's name, and what it must survive."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.native_matrices import TEST_LEVELS, runtime
from torch import Tensor

from moeserve.cpu_backend import _native as native

Settings = tuple[int, int, int]  # of a Layout: format, rows, columns

INT8, FP8, MXFP4, ODD_MXFP4 = (2, 20, 33), (5, 4, 130), (4, 4, 64), (4, 4, 40)
GATE_UP, DOWN = (0, 64, 10), (0, 10, 20)


def empty_data(settings: Settings) -> Tensor:
    return torch.zeros(native.Layout(*settings).num_bytes, dtype=torch.uint8)


DATA, FP8_DATA, MXFP4_DATA = empty_data(INT8), empty_data(FP8), empty_data(MXFP4)


def int8_matrix(data: Tensor = DATA, bias: Tensor | None = None) -> native.PackedMatrix:
    return native.PackedMatrix(native.Layout(*INT8), data, bias)


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
        ((3, 4, 4, 0), "group: 0; int4 takes 32, 64 or 128"),
        ((3, 4, 4, 33), "group: 33"),
        ((2, 4, 4, 0, True), "asymmetric: only int4"),
    ],
)
def test_layouts(settings: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.Layout(*settings)


IDS, X = torch.arange(20), torch.zeros(20, 33)


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


def bytes_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


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


@pytest.mark.parametrize(
    ("data", "bias", "message"),
    [
        (DATA.char(), None, "data: must be uint8"),
        (DATA[:100], None, r"data: shape \[100\]"),
        (bytes_of(DATA.numel() + 1)[1:], None, "data: its address is no multiple of 4"),
        (DATA, torch.zeros(20).double(), "bias: must be float32"),
        (DATA, torch.zeros(19), r"bias: shape \[19\], expected \[20\]"),
        (DATA, torch.zeros(40)[::2], "bias: is not contiguous"),
    ],
)
def test_matrix(data: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8_matrix(data, bias)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.zeros(3, 33).double(), torch.zeros(3, 20), "x: must be float32"),
        (torch.zeros(3, 33), torch.zeros(3, 20).int(), "out: must be float32"),
        (torch.zeros(3, 32), torch.zeros(3, 20), r"x: shape \[3, 32\], expected \[rows, 33\]"),
        (torch.zeros(3, 33), torch.zeros(2, 20), r"out: shape \[2, 20\], expected \[3, 20\]"),
        (torch.zeros(33), torch.zeros(1, 20), r"x: shape \[33\]"),
        (torch.zeros(33, 3).T, torch.zeros(3, 20), "x: its rows are not contiguous"),
        (torch.zeros(3, 33), torch.zeros(20).expand(3, 20), "out: its rows overlap"),
    ],
)
def test_products(x: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8_matrix().run(runtime("scalar"), x, out)


def misaligned(count: int) -> np.ndarray:
    return np.zeros(4 * count + 1, dtype=np.uint8)[1:].view(np.float32)


def test_misaligned_arrays() -> None:
    x, out = np.zeros((3, 33), dtype=np.float32), np.zeros((3, 20), dtype=np.float32)
    with pytest.raises(ValueError, match="x: its address is no multiple of 4; copy it"):
        int8_matrix().run(runtime("scalar"), misaligned(99).reshape(3, 33), out)
    with pytest.raises(ValueError, match="out: its address is no multiple of 4"):
        int8_matrix().run(runtime("scalar"), x, misaligned(60).reshape(3, 20))
    with pytest.raises(ValueError, match="bias: its address is no multiple of 4"):
        native.PackedMatrix(native.Layout(*INT8), DATA, misaligned(20))
    # Aligned to its own numbers is enough: rows of a slice, halves at an odd place.
    int8_matrix().run(runtime("scalar"), torch.zeros(3, 40)[:, 3:36], torch.zeros(3, 21)[:, 1:])
    int8_matrix().run(
        runtime("scalar"), torch.zeros(3, 40).half()[:, 3:36], torch.zeros(3, 21).half()[:, 1:]
    )


def test_arrays_of_another_kind() -> None:
    out = torch.zeros(3, 20)
    with pytest.raises(TypeError):
        int8_matrix().run(runtime("scalar"), [[0.0] * 33], out)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        int8_matrix().run(runtime("scalar"), None, out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gate_up", "down", "activation", "message"),
    [
        ((0, 48, 10), DOWN, 0, "gate_up: its shape does not fit"),
        ((0, 96, 10), DOWN, 0, "gate_up: its shape does not fit"),
        ((0, 64, 11), DOWN, 0, "gate_up: its shape does not fit"),
        (GATE_UP, (0, 10, 33), 0, "gate_up: its shape does not fit"),
        (GATE_UP, (0, 10, 16), 0, "gate_up: its shape does not fit"),
        (GATE_UP, DOWN, 6, "activation: 6 is none"),
        (GATE_UP, DOWN, -1, "activation: -1 is none"),
    ],
)
def test_expert_shapes(gate_up: Settings, down: Settings, activation: int, message: str) -> None:
    layouts = native.Layout(*gate_up), native.Layout(*down)
    with pytest.raises(ValueError, match=message):
        native.PackedExperts(*layouts, False, activation, 0.0, 0.0, 4)


def experts_of(count: int) -> native.PackedExperts:
    layouts = native.Layout(*GATE_UP), native.Layout(*DOWN)
    return native.PackedExperts(*layouts, True, 0, 0.0, 0.0, count)


def test_number_of_experts() -> None:
    for count in (0, -1):
        with pytest.raises(ValueError, match="num_experts: must be at least 1"):
            experts_of(count)


def two_experts(records: int = 2) -> native.PackedExperts:
    experts = experts_of(2)
    for expert in range(records):
        experts.set_record(expert, native.allocate(experts.record_bytes))
    return experts


def test_records() -> None:
    experts = two_experts()
    size = experts.record_bytes
    assert (size % 4096, experts.down_offset) == (0, native.Layout(*GATE_UP).num_bytes)
    for expert in (-1, 2):
        with pytest.raises(ValueError, match=f"expert: {expert} is out of range"):
            experts.set_record(expert, bytes_of(size))
    for record, message in (
        (bytes_of(size - 1), "record: shape"),
        (bytes_of(size).char(), "record: must be uint8"),
        (bytes_of(2 * size)[::2], "record: is not contiguous"),
        (bytes_of(size + 1)[1:], "record: its address is no multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            experts.set_record(0, record)


TOKENS = torch.zeros(3, 10)
CHOICES = torch.zeros(3, 2, dtype=torch.int64)
FACTORS = torch.zeros(3, 2)
WANTED = torch.ones(2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TOKENS.double(), CHOICES, FACTORS, None, TOKENS), "x: must be float32"),
        ((TOKENS[:, :9], CHOICES, FACTORS, None, TOKENS), r"x: shape \[3, 9\]"),
        ((TOKENS, CHOICES.int(), FACTORS, None, TOKENS), "ids: must be int64"),
        ((TOKENS, CHOICES[:2], FACTORS, None, TOKENS), r"ids: shape \[2, 2\]"),
        ((TOKENS, CHOICES[:, 0].clone(), FACTORS, None, TOKENS), r"ids: shape \[3\]"),
        ((TOKENS, CHOICES[:, :1], FACTORS, None, TOKENS), "ids: is not contiguous"),
        ((TOKENS, CHOICES, FACTORS.double(), None, TOKENS), "weights: must be float32"),
        ((TOKENS, CHOICES, FACTORS[:, :1], None, TOKENS), "weights: is not contiguous"),
        ((TOKENS, CHOICES, FACTORS[:, :1].clone(), None, TOKENS), r"weights: shape \[3, 1\]"),
        ((TOKENS, CHOICES, FACTORS, WANTED.bool(), TOKENS), "wanted: must be uint8"),
        ((TOKENS, CHOICES, FACTORS, WANTED[:1], TOKENS), r"wanted: shape \[1\], expected \[2\]"),
        ((TOKENS, CHOICES, FACTORS, WANTED.repeat(2)[::2], TOKENS), "wanted: is not contiguous"),
        ((TOKENS, CHOICES + 2, FACTORS, None, TOKENS), r"ids: 2 is not within 0..1"),
        ((TOKENS, CHOICES - 1, FACTORS, None, TOKENS), r"ids: -1 is not within 0..1"),
        ((TOKENS, CHOICES, FACTORS, None, TOKENS.double()), "out: must be float32"),
        ((TOKENS, CHOICES, FACTORS, None, TOKENS[:2]), r"out: shape \[2, 10\]"),
        ((TOKENS, CHOICES, FACTORS, None, torch.zeros(3, 20)[:, :10]), "out: is not contiguous"),
    ],
)
def test_expert_jobs(
    arguments: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor], message: str
) -> None:
    experts = two_experts()
    for call in (experts.run, experts.submit):
        with pytest.raises(ValueError, match=message):
            call(runtime("scalar"), *arguments)


def test_an_expert_without_a_record() -> None:
    experts, out = two_experts(records=1), torch.ones(3, 10)
    with pytest.raises(ValueError, match="ids: expert 1 has no record"):
        experts.run(runtime("scalar"), TOKENS, CHOICES + 1, FACTORS, None, out)
    only_the_first = torch.tensor([1, 0], dtype=torch.uint8)
    experts.run(runtime("scalar"), TOKENS, CHOICES + 1, FACTORS, only_the_first, out)
    assert not out.any()


@pytest.mark.parametrize(
    ("x", "weight", "out", "message"),
    [
        (TOKENS.double(), torch.ones(10), TOKENS, "x: must be float32"),
        (TOKENS, torch.ones(10).double(), TOKENS, "weight: must be float32"),
        (TOKENS, torch.ones(1, 10), TOKENS, "weight: must have one dimension"),
        (TOKENS, torch.ones(20)[::2], TOKENS, "weight: is not contiguous"),
        (TOKENS, torch.ones(9), TOKENS, r"x: shape \[3, 10\], expected \[rows, 9\]"),
        (TOKENS, torch.ones(10), TOKENS.half(), "out: must have the dtype of x"),
        (TOKENS, torch.ones(10), TOKENS[:2], r"out: shape \[2, 10\]"),
    ],
)
def test_rms_norm(x: Tensor, weight: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.rms_norm(runtime("scalar"), x, weight, 1e-6, out)


def test_isa_levels_that_cannot_run() -> None:
    with pytest.raises(ValueError, match="isa: 'avx1024' is none of scalar"):
        native.Runtime("avx1024", 1)
    unusable = [level for level in native.isa_levels() if not level.usable]
    if not unusable:
        pytest.skip("this machine runs every level")
    for level in unusable:
        reason = ", ".join(level.missing) if level.built else "this build does not have it"
        with pytest.raises(ValueError, match=f"isa: {level.name} cannot run here.*{reason}"):
            native.Runtime(level.name, 1)


def test_isa_levels() -> None:
    levels = native.isa_levels()
    assert levels[0].name == "scalar"
    usable = native.usable_isa_extensions()
    for level in levels:
        assert level.usable == (level.built and not level.missing)
        assert not set(level.missing) & set(usable)
        if level.usable:
            own = native.Runtime(level.name, 1)
            assert (own.isa, own.num_threads) == (level.name, 1)


def affinity() -> set[int]:
    return os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: native.Runtime("scalar", 0), "num_threads: less than 1"),
        (lambda: native.Runtime("scalar", -3), "num_threads: less than 1"),
        (lambda: native.Runtime("scalar", 2, [0]), "cpus: 1 cores for 2 threads"),
        (lambda: native.Runtime("scalar", 1, [0, 1]), "cpus: 2 cores for 1 threads"),
        (lambda: native.Runtime("scalar", 2, [min(affinity()), 1 << 20]), "cpus: .*core 1048576"),
        (lambda: native.Runtime("scalar", 1, [-1]), "cpus: .*core -1"),
        (lambda: native.pin_this_thread(1 << 20), "cpus: .*core 1048576"),
    ],
)
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are not pinned here")
def test_threads_and_cores(make: Callable[[], object], message: str) -> None:
    before = affinity()
    with pytest.raises(ValueError, match=message):
        make()
    assert affinity() == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are not pinned here")
def test_a_pinned_runtime_leaves_the_caller_where_it_is() -> None:
    before = affinity()
    core = min(before)
    pinned = native.Runtime("scalar", 3, [core, core, core])  # more threads than cores
    assert affinity() == before
    out = torch.zeros(3, 20)
    int8_matrix().run(pinned, torch.zeros(3, 33), out)
    assert affinity() == before


TOO_MANY_THREADS = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from moeserve.cpu_backend import _native as native
try:
    native.Runtime("scalar", 100_000)
except ValueError as error:
    print(error)
runtime = native.Runtime("scalar", 8)
print(runtime.num_threads)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_more_threads_than_the_system_has_room_for() -> None:
    """In a process of its own, with little room for stacks; then a Runtime of a usual size."""
    process = subprocess.run(
        [sys.executable, "-c", TOO_MANY_THREADS], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    first, second = process.stdout.splitlines()
    assert first.startswith("num_threads: 100000; the system refuses more than")
    assert second == "8"


@pytest.mark.parametrize("isa", TEST_LEVELS)
def test_measurements(isa: str) -> None:
    """That they are speeds at all; how fast this machine is, is not for tests to say."""
    assert runtime(isa).measure_read_bandwidth(1 << 20, 1) > 1e6
    with pytest.raises(ValueError, match="type: 'f64' is none of f32, bf16, int8"):
        runtime(isa).measure_dot_peak("f64", 1)
    if isa == TEST_LEVELS[-2]:  # the fastest; half a second each on the plain ones
        for number_type in ("f32", "bf16", "int8"):
            assert runtime(isa, 2).measure_dot_peak(number_type, 1) > 1e6
