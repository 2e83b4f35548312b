"""The machine's limits, by moeserve's native functions: what the kernels are held against."""

from __future__ import annotations

from typing import Any

from moeserve.cpu_backend import _native

READ_BYTES = 2 << 30
DOT_TYPES = ("f32", "bf16", "int8")
NAMES = ("measure_read_bandwidth", "measure_dot_peak")


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """settings: threads. read_bytes_per_s: by threads; dot_ops_per_s: by type, all threads."""
    missing = [name for name in NAMES if not hasattr(_native, name)]
    if missing:
        return {"skipped": f"moeserve's native module has no {', '.join(missing)}"}
    threads = settings["threads"]
    return {
        "read_bytes_per_s": {
            str(n): _native.measure_read_bandwidth(n, READ_BYTES) for n in sorted({1, threads})
        },
        "dot_ops_per_s": {name: _native.measure_dot_peak(name, threads) for name in DOT_TYPES},
    }
