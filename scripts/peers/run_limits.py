"""The machine's limits, by moeserve's native functions: what the kernels are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeserve.cpu_backend import _native
from peers.measure import Skip

READ_BYTES = 2 << 30
DOT_TYPES = ("f32", "bf16", "int8")


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """settings: threads. read_bytes_per_s: by threads; dot_ops_per_s: by type, all threads."""
    read, dot = _function("measure_read_bandwidth"), _function("measure_dot_peak")
    threads = settings["threads"]
    return {
        "read_bytes_per_s": {str(n): read(n, READ_BYTES) for n in sorted({1, threads})},
        "dot_ops_per_s": {name: dot(name, threads) for name in DOT_TYPES},
    }


def _function(name: str) -> Callable[..., float]:
    found: Callable[..., float] | None = getattr(_native, name, None)
    if found is None:
        raise Skip(f"moeserve's native module has no {name}")
    return found
