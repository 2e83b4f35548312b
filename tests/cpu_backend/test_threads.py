"""Threads: what affinity and cgroups allow, and that torch and BLAS keep to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeserve.core import ConfigError
from moeserve.cpu_backend.cgroup import cgroup_cores
from moeserve.cpu_backend.threads import affinity_cores, plan_threads, torch_threads


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cgroup_2_takes_the_tightest_of_the_ancestors(tmp_path: Path) -> None:
    write(tmp_path / "self", "0::/a/b/c\n")
    root = tmp_path / "fs"
    write(root / "a" / "b" / "c" / "cpu.max", "max 100000\n")
    assert cgroup_cores(tmp_path / "self", root) is None
    write(root / "a" / "cpu.max", "150000 100000\n")
    assert cgroup_cores(tmp_path / "self", root) == 1.5
    write(root / "a" / "b" / "cpu.max", "400000 100000\n")
    assert cgroup_cores(tmp_path / "self", root) == 1.5


def test_cgroup_1_in_a_container_that_does_not_see_its_path(tmp_path: Path) -> None:
    write(tmp_path / "self", "5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/docker/x\n")
    root = tmp_path / "fs"
    write(root / "memory" / "cpu.cfs_quota_us", "1\n")
    write(root / "cpu,cpuacct" / "cpu.cfs_quota_us", "-1\n")
    write(root / "cpu,cpuacct" / "cpu.cfs_period_us", "50000\n")
    assert cgroup_cores(tmp_path / "self", root) is None
    write(root / "cpu,cpuacct" / "cpu.cfs_quota_us", "125000\n")
    assert cgroup_cores(tmp_path / "self", root) == 2.5


def test_no_cgroups(tmp_path: Path) -> None:
    assert cgroup_cores(tmp_path / "absent", tmp_path) is None


@pytest.mark.parametrize(
    ("requested", "allowed", "quota", "expected"),
    [
        (None, 8, None, 8),
        (None, 8, 2.9, 2),
        (None, 8, 0.5, 1),
        (None, 2, 16.0, 2),
        (3, 8, None, 3),
        (12, 8, 4.0, 12),
    ],
)
def test_plan(requested: int | None, allowed: int, quota: float | None, expected: int) -> None:
    plan = plan_threads(requested, allowed, quota)
    assert plan.num_threads == expected
    assert f"{allowed} cores" in plan.reason
    assert ("asked for" in plan.reason) == (requested is not None)
    assert ("more than" in plan.reason) == (expected > allowed)


@pytest.mark.parametrize("requested", [0, -3])
def test_no_threads_is_refused(requested: int) -> None:
    with pytest.raises(ConfigError, match=f"num_threads: {requested}"):
        plan_threads(requested, 4, None)


PROGRAM = """
import json, numpy, threadpoolctl, torch
from moeserve.cpu_backend.threads import use_threads
plan = use_threads(None)
libraries = threadpoolctl.threadpool_info()
blas = [library["num_threads"] for library in libraries if library["user_api"] == "blas"]
print(json.dumps([plan.num_threads, torch.get_num_threads(), blas]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this platform")
@pytest.mark.parametrize("num_cores", [1, affinity_cores()])
def test_a_process_keeps_to_its_affinity(num_cores: int) -> None:
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    result = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {cores})\n{PROGRAM}"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    planned, torch_threads, blas_threads = json.loads(result.stdout)
    quota = cgroup_cores()
    assert planned == torch_threads == plan_threads(None, num_cores, quota).num_threads
    assert set(blas_threads) == {1}


def test_torch_gets_its_threads_back() -> None:
    before = torch.get_num_threads()
    inside = []

    def fail() -> None:
        with torch_threads(before + 1):
            inside.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before
