"""The ISA report against the kernel's own."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from moeserve.cpu_backend._native import usable_isa_extensions

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the report is empty elsewhere")
def test_names_are_those_of_proc_cpuinfo() -> None:
    flags: set[str] = set()
    for line in CPUINFO.read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    known = {
        "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
        "avx_vnni",
    }  # fmt: skip
    usable = set(usable_isa_extensions())
    assert usable & known == flags & known
    # AMX needs the kernel's permission besides the flag, so a report may hold less, never more.
    assert usable - known <= flags
