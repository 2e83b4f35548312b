"""What is read from /proc and /sys, on made-up machines."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.cpu_backend.cgroup import cgroup_memory_bytes, cgroup_memory_left
from moeserve.cpu_backend.machine import (
    allowed_cores,
    cpu_model,
    huge_page_mode,
    memory_bytes,
    memory_left,
    node_first,
    numa_nodes,
    parse_core_list,
)
from moeserve.cpu_backend.memory_room import memory_room


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def node(sys: Path, number: int, cores: str) -> None:
    write(sys / "devices" / "system" / "node" / f"node{number}" / "cpulist", f"{cores}\n")


def test_nodes_in_order_of_number_and_nodes_of_memory_alone(tmp_path: Path) -> None:
    write(tmp_path / "devices" / "system" / "node" / "possible", "0-10\n")
    node(tmp_path, 10, "1,3-5")
    node(tmp_path, 2, "0,2")
    node(tmp_path, 3, "")
    nodes = numa_nodes(tmp_path)
    assert nodes == {2: [0, 2], 3: [], 10: [1, 3, 4, 5]}
    assert list(nodes) == [2, 3, 10]


def test_no_nodes_where_the_system_names_none(tmp_path: Path) -> None:
    assert numa_nodes(tmp_path) == {}
    assert node_first([3, 1, 2], {}) == [1, 2, 3]


@given(st.sets(st.integers(0, 300)))
def test_a_core_list_of_any_cores(cores: set[int]) -> None:
    assert parse_core_list(",".join(map(str, sorted(cores)))) == sorted(cores)


def test_core_lists_as_the_kernel_writes_them() -> None:
    assert parse_core_list("0-2,5,8-9\n") == [0, 1, 2, 5, 8, 9]
    assert parse_core_list("\n") == []


def test_one_node_is_filled_before_the_next() -> None:
    """Cores dealt out to the nodes in turn, as many machines do."""
    nodes = {0: [0, 2, 4, 6], 1: [1, 3, 5, 7]}
    assert node_first(range(8), nodes) == [0, 2, 4, 6, 1, 3, 5, 7]


def test_the_node_with_most_of_the_allowed_cores_comes_first() -> None:
    nodes = {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}
    assert node_first([1, 4, 5, 7], nodes) == [4, 5, 7, 1]


@given(
    st.sets(st.integers(0, 31), min_size=1),
    st.lists(st.integers(0, 3), min_size=32, max_size=32),
)
def test_every_order_keeps_nodes_together(allowed: set[int], node_of: list[int]) -> None:
    nodes = {n: [core for core in range(32) if node_of[core] == n] for n in range(4)}
    order = node_first(sorted(allowed), nodes)
    assert sorted(order) == sorted(allowed)
    runs = [node_of[core] for core in order]
    changes = sum(a != b for a, b in itertools.pairwise(runs))
    assert changes == len(set(runs)) - 1
    sizes = [runs.count(n) for n in dict.fromkeys(runs)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("always [madvise] never\n", "madvise"),
        ("[always] madvise never\n", "always"),
        ("always madvise [never]\n", "never"),
        ("", None),
    ],
)
def test_huge_pages(text: str, mode: str | None, tmp_path: Path) -> None:
    assert huge_page_mode(tmp_path) is None
    write(tmp_path / "kernel" / "mm" / "transparent_hugepage" / "enabled", text)
    assert huge_page_mode(tmp_path) == mode


def test_memory(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path) is None
    write(
        tmp_path / "meminfo",
        "MemTotal:       16000 kB\nMemFree:  5 kB\nMemAvailable:    8000 kB\nHugePages_Total:  0\n",
    )
    assert memory_bytes(tmp_path) == (16000 * 1024, 8000 * 1024)


def test_memory_left(tmp_path: Path) -> None:
    """The least of what the machine and the groups leave, by both ways of counting."""
    no_group = tmp_path / "none"
    assert memory_left(tmp_path) is None
    assert memory_room(tmp_path, no_group, tmp_path) == (0, 0), "nobody says that there is any"
    write(tmp_path / "meminfo", "MemTotal: 9000 kB\nMemFree: 5 kB\nMemAvailable: 8000 kB\n")
    assert memory_room(tmp_path, no_group, tmp_path) == (8000 * 1024, 5 * 1024)
    root = tmp_path / "fs"
    stat = "anon 7\nfile 1000000\nactive_file {active}\ninactive_file 24\n"
    for group, limit, used, active in (("a/b", 5000, 4000, 300), ("a", 6000, 5500, 7000)):
        write(root / group / "memory.max", f"{limit}\n")
        write(root / group / "memory.current", f"{used}\n")
        write(root / group / "memory.stat", stat.format(active=active))
    write(tmp_path / "self", "0::/a/b\n")
    assert memory_room(tmp_path, tmp_path / "self", root) == (1000 + 324, 500)
    write(root / "a/b" / "memory.current", "5001\n")  # the kernel lets a group exceed it a little
    assert memory_room(tmp_path, tmp_path / "self", root) == (324, 0)


def test_memory_left_of_cgroup_1(tmp_path: Path) -> None:
    write(tmp_path / "self", "5:memory:/docker/x\n")
    root = tmp_path / "fs"
    write(root / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    assert cgroup_memory_left(tmp_path / "self", root) is None
    group = root / "memory" / "docker" / "x"
    write(group / "memory.limit_in_bytes", "4096000\n")
    write(group / "memory.usage_in_bytes", "4000000\n")
    stat = "cache 5\nactive_file 1\ninactive_file 2\ntotal_active_file 30\ntotal_inactive_file 4\n"
    write(group / "memory.stat", stat)
    assert cgroup_memory_left(tmp_path / "self", root) == (96000 + 34, 96000)


def test_the_processors_name(tmp_path: Path) -> None:
    assert cpu_model(tmp_path)  # from the platform
    write(tmp_path / "cpuinfo", "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t: x\n")
    assert cpu_model(tmp_path) == "Some CPU @ 2 GHz"


def test_memory_of_cgroup_2(tmp_path: Path) -> None:
    write(tmp_path / "self", "0::/a/b\n")
    root = tmp_path / "fs"
    write(root / "a" / "b" / "memory.max", "max\n")
    assert cgroup_memory_bytes(tmp_path / "self", root) is None
    write(root / "a" / "memory.max", "1073741824\n")
    write(root / "memory.max", "2147483648\n")
    assert cgroup_memory_bytes(tmp_path / "self", root) == 1 << 30


def test_memory_of_cgroup_1(tmp_path: Path) -> None:
    write(tmp_path / "self", "5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n")
    root = tmp_path / "fs"
    write(root / "cpu,cpuacct" / "memory.limit_in_bytes", "1\n")
    write(root / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    assert cgroup_memory_bytes(tmp_path / "self", root) is None
    write(root / "memory" / "docker" / "x" / "memory.limit_in_bytes", "4096\n")
    assert cgroup_memory_bytes(tmp_path / "self", root) == 4096


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="no /proc here")
def test_this_machine() -> None:
    found = memory_bytes()
    assert found is not None
    assert 0 < memory_room().available_bytes <= found[0]
    assert 0 < found[1] <= found[0] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    nodes = numa_nodes()
    if nodes:
        assert set(allowed_cores()) <= {core for cores in nodes.values() for core in cores}
