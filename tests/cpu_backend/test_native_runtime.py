"""ISA levels, threads and cores of a Runtime: what is refused, and what it must survive."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.native_arguments import int8_matrix
from support.native_matrices import TEST_LEVELS, runtime

from moeserve.core import ExpertSpec
from moeserve.cpu_backend import _native as native
from moeserve.cpu_backend.packing import PackedExperts, PackFormat


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
    memory = np.zeros((2 << 20) + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][: 2 << 20]
    assert runtime(isa).measure_reading(memory) > 1e6
    for refused in (memory[: 1 << 10], memory[::2], memory[3:], memory.view(np.int8)):
        with pytest.raises(ValueError, match="memory: "):
            runtime(isa).measure_reading(refused)
    with pytest.raises(ValueError, match="type: 'f64' is none of f32, bf16, int8"):
        runtime(isa).measure_dot_peak("f64", 1)
    with pytest.raises(ValueError, match="rounds: less than 1"):
        runtime(isa).measure_dot_peak("f32", 1, 0)
    if isa == TEST_LEVELS[-2]:  # the fastest; half a second each on the plain ones
        for number_type in ("f32", "bf16", "int8"):
            assert runtime(isa, 2).measure_dot_peak(number_type, 1) > 1e6


def test_part_times_are_taken_once() -> None:
    own = native.Runtime("scalar", 2)
    spec = ExpertSpec(num_experts=2, hidden_size=64, intermediate_size=32)
    experts = PackedExperts(own, spec, PackFormat("float32"))
    x, ids = torch.ones(3, 64), torch.tensor([[0], [1], [1]])
    experts.native.run(own, x, ids, torch.ones(3, 1), None, torch.empty(3, 64))
    times = own.take_part_times()
    assert times["gate, up"] > 0
    assert times["down"] > 0
    assert times["attention"] == 0
    assert not any(own.take_part_times().values())
