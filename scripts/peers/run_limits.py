"""The machine's limits, by moeserve's native functions: what the kernels are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeserve.cpu_backend.native_runtime import NativeRuntime
from peers.measure import Limits

if TYPE_CHECKING:
    from moeserve.cpu_backend import _native

READ_BYTES = 2 << 30
DOT_TYPES = ("f32", "bf16", "int8")


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """settings: threads. read_bytes_per_s: by threads; dot_ops_per_s: by type, all threads."""
    threads = settings["threads"]
    runtimes = {n: NativeRuntime(n).handle for n in sorted({1, threads})}
    return {
        "read_bytes_per_s": {
            str(n): runtime.measure_read_bandwidth(READ_BYTES) for n, runtime in runtimes.items()
        },
        "dot_ops_per_s": {name: runtimes[threads].measure_dot_peak(name) for name in DOT_TYPES},
    }


def limits_now(runtime: _native.Runtime) -> Limits:
    """Of all its threads, beside what the process holds: "read", bytes/s; by type, operations/s."""
    peaks = {name: runtime.measure_dot_peak(name) for name in DOT_TYPES}
    return {"read": runtime.measure_read_bandwidth(READ_BYTES // 2), **peaks}
