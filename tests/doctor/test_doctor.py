"""moeserve doctor: facts of made-up machines, the problems they mean, and a run on this one."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moeserve.cpu_backend import _native
from moeserve.cpu_backend.ipex_backend import ipex_version
from moeserve.cpu_backend.machine import PROC, SYS, allowed_cores, memory_bytes
from moeserve.cpu_backend.native_runtime import choose_isa
from moeserve.doctor.facts import (
    Backend,
    Facts,
    IsaLevel,
    Memory,
    gather,
    measure,
    required_packages,
)
from moeserve.doctor.problems import Problem, find_problems
from moeserve.doctor.render import core_list, show

GIB = 1 << 30


@pytest.fixture(scope="module")
def facts() -> Facts:
    """Of this machine, with what would be a problem mended."""
    found = gather(quick=True)
    cores = dataclasses.replace(found.cores, quota=None, nodes={0: found.cores.allowed})
    return dataclasses.replace(
        found,
        processor=dataclasses.replace(
            found.processor,
            chosen="avx2",
            isa_levels=[IsaLevel("avx2", usable=True, built=True, missing=[])],
        ),
        cores=cores,
        memory=Memory(64 * GIB, 32 * GIB, None, "madvise"),
        backends=[Backend("native", "1", None)],
        torch=dataclasses.replace(found.torch, onednn=True),
        cache_error=None,
    )


def changed(facts: Facts, part: str, **values: Any) -> Facts:
    inner = dataclasses.replace(getattr(facts, part), **values)
    return dataclasses.replace(facts, **{part: inner})


def only_problem(facts: Facts) -> Problem:
    (problem,) = find_problems(facts)
    return problem


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_nothing_wrong(facts: Facts) -> None:
    assert find_problems(facts) == []


def test_a_made_up_machine_is_read(tmp_path: Path) -> None:
    sys_root, proc = tmp_path / "sys", tmp_path / "proc"
    write(sys_root / "devices" / "system" / "node" / "node0" / "cpulist", "0-7\n")
    write(sys_root / "devices" / "system" / "node" / "node1" / "cpulist", "8-15\n")
    write(sys_root / "kernel" / "mm" / "transparent_hugepage" / "enabled", "always [never]\n")
    write(sys_root / "fs" / "cgroup" / "pod" / "cpu.max", "50000 100000\n")
    write(sys_root / "fs" / "cgroup" / "pod" / "memory.max", f"{GIB // 2}\n")
    write(proc / "self" / "cgroup", "0::/pod\n")
    write(proc / "meminfo", "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    write(proc / "cpuinfo", "model name : Made Up 9000\n")
    found = gather(quick=True, sys=sys_root, proc=proc)
    assert found.processor.model == "Made Up 9000"
    assert found.cores.nodes == {0: list(range(8)), 1: list(range(8, 16))}
    assert (found.cores.quota, found.cores.num_threads) == (0.5, 1)
    assert found.memory == Memory(8 * GIB, 4 * GIB, GIB // 2, "never")
    assert found.speed is None
    said = " ".join(problem.what for problem in find_problems(found))
    assert "the cgroup grants 0.5 cores" in said
    assert "the cgroup grants 0.50 GiB of memory" in said
    assert "huge pages are off" in said


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    found = gather(quick=True, sys=tmp_path, proc=tmp_path)
    assert found.memory == Memory(None, None, None, None)
    assert found.cores.nodes == {}
    show(Console(file=io.StringIO()), found, find_problems(found))


def test_a_missing_package_is_fatal(facts: Facts) -> None:
    problem = only_problem(dataclasses.replace(facts, packages={"pyzmq": None, "numpy": "2.0"}))
    assert problem == Problem(True, "pyzmq is not installed", "pip install pyzmq")


def test_kernels_that_were_not_built(facts: Facts) -> None:
    level = IsaLevel("avx512_bf16", usable=False, built=False, missing=[])
    problem = only_problem(changed(facts, "processor", isa_levels=[level]))
    assert "could run the avx512_bf16 kernels" in problem.what
    unable = dataclasses.replace(level, missing=["amx_tile"])
    assert find_problems(changed(facts, "processor", isa_levels=[unable])) == []


def test_scalar_kernels_only(facts: Facts) -> None:
    problem = only_problem(changed(facts, "processor", chosen="scalar", reason="avx2 needs fma"))
    assert "only scalar kernels can run (avx2 needs fma)" in problem.what


@pytest.mark.parametrize(
    ("quota", "said"),
    [(0.25, "0.25 cores: even one"), (2.5, "2.5 cores and affinity 4"), (4.0, ""), (None, "")],
)
def test_cgroup_quotas(quota: float | None, said: str, facts: Facts) -> None:
    found = find_problems(changed(facts, "cores", quota=quota, allowed=[0, 1, 2, 3]))
    assert [said in problem.what for problem in found] == [True] * bool(said)


def test_two_numa_nodes(facts: Facts) -> None:
    nodes = {0: [0, 2], 1: [1, 3], 2: []}
    problem = only_problem(changed(facts, "cores", nodes=nodes, allowed=[0, 1, 2, 3]))
    assert "2 NUMA nodes" in problem.what
    assert "numactl --cpunodebind=0 --membind=0 moeserve serve (2 cores)" in problem.fix
    assert find_problems(changed(facts, "cores", nodes=nodes, allowed=[1, 3])) == []


@pytest.mark.parametrize(
    ("available_bytes", "limit_bytes", "said"),
    [
        (GIB // 2, None, "available are 0.50 GiB"),
        (8 * GIB, GIB // 4, "the cgroup grants 0.25 GiB"),
        (GIB // 2, 4 * GIB, "available are 0.50 GiB"),
    ],
)
def test_little_memory(
    available_bytes: int, limit_bytes: int | None, said: str, facts: Facts
) -> None:
    memory = {"available_bytes": available_bytes, "limit_bytes": limit_bytes}
    assert said in only_problem(changed(facts, "memory", **memory)).what


def test_huge_pages_never(facts: Facts) -> None:
    problem = only_problem(changed(facts, "memory", huge_pages="never"))
    assert problem.fix == "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"


def test_torch_without_onednn(facts: Facts) -> None:
    assert "without oneDNN" in only_problem(changed(facts, "torch", onednn=False)).what


def test_a_broken_backend_is_a_problem_and_an_absent_one_is_none(facts: Facts) -> None:
    absent = Backend("ipex", None, "not installed")
    assert find_problems(dataclasses.replace(facts, backends=[absent])) == []
    broken = Backend("ipex", "2.8.0", "does not fit torch 2.13")
    problem = only_problem(dataclasses.replace(facts, backends=[broken]))
    assert "ipex backend cannot be used: does not fit" in problem.what


def test_a_cache_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "file", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    found = gather(quick=True)
    assert found.cache_error == f"{tmp_path / 'file'} is no directory"
    assert any("measures at every start" in problem.what for problem in find_problems(found))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "yet"))
    assert gather(quick=True).cache_error is None


def test_fatal_problems_come_first(facts: Facts) -> None:
    both = changed(dataclasses.replace(facts, packages={"x": None}), "torch", onednn=False)
    assert [problem.fatal for problem in find_problems(both)] == [True, False]


def test_required_packages_are_those_of_the_metadata() -> None:
    packages = required_packages()
    assert {"torch", "numpy", "pyzmq", "msgspec", "safetensors"} <= set(packages)
    assert not {"pytest", "ruff", "intel-extension-for-pytorch"} & set(packages)
    assert packages["torch"]


def test_core_lists() -> None:
    assert core_list([0, 1, 2, 5, 8, 9]) == "0-2,5,8-9"
    assert core_list([]) == ""


def test_speed_is_measured() -> None:
    memory = memory_bytes()
    limited = Memory(None, memory[1] if memory else None, 64 << 20, None)  # reads 8 MiB
    speed = measure(choose_isa("auto")[0], 1, limited)
    assert speed.read_one_thread > 1e8
    assert set(speed.dot_peak) == {"f32", "bf16", "int8"}
    assert min(speed.dot_peak.values()) > 1e8


def run_doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moeserve.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_this_machine_as_json() -> None:
    done = run_doctor("--quick", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["can_serve"] else 1)
    assert report["can_serve"], report["problems"]
    levels = {level["name"]: level for level in report["processor"]["isa_levels"]}
    for level in _native.isa_levels():
        assert levels[level.name]["usable"] == level.usable
        assert levels[level.name]["missing"] == level.missing
    assert report["processor"]["chosen"] == choose_isa("auto")[0]
    assert report["cores"]["allowed"] == allowed_cores()
    assert report["speed"] is None
    backends = {each["name"]: each for each in report["backends"]}
    assert backends["native"]["lacks"] is None
    assert backends["torch"]["lacks"] is None
    if ipex_version() is None:
        assert "pip install 'moeserve[ipex]'" in backends["ipex"]["lacks"]


def test_this_machine_in_words() -> None:
    done = run_doctor()
    assert done.returncode == 0, done.stderr
    for word in ("processor", "compute threads", "GB/s", "operations/s", "native", "packages"):
        assert word in done.stdout
    assert "moeserve can serve here" in done.stdout
    if (PROC / "meminfo").is_file() and (SYS / "devices").is_dir():
        assert "available" in done.stdout


BROKEN_TORCH = """
import sys
sys.modules["torch"] = None  # what `import torch` then raises is an ImportError
from moeserve.cli import main
sys.exit(main(["doctor", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_without_torch_it_says_so_and_ends_with_1(as_json: bool) -> None:
    command = [sys.executable, "-c", BROKEN_TORCH, *(["--json"] if as_json else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = done.stdout if as_json else done.stderr
    assert "torch" in said
    assert "pip install" in said
    if as_json:
        assert json.loads(said)["can_serve"] is False
