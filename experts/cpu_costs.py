"""What the experts of a loaded model cost on this CPU: measured on them, when the model starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from statistics import median

import torch

from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.cpu_backend.threads import torch_threads
from moeserve.experts.schedule.profile import ExpertCurve, Figure, Processor, ReadRate

#: read to measure memory bandwidth: far more than any cache holds
BANDWIDTH_BYTES = 256 << 20
ROWS = (1, 4, 16, 64)
#: jobs per point, of which the median counts
NUM_REPEATS = 7
#: experts of a job beyond the first
NUM_MORE = 4


def measure_cpu(native: NativeRuntime, experts: PackedExperts) -> Processor:
    """experts: of a layer, all with their records. Takes a fraction of a second."""
    num_more = min(NUM_MORE, experts.spec.num_experts - 1)
    with torch_threads(1):
        start_us, more_us = start_and_more_us(_Jobs(native, experts).median_us, num_more)
    spec = experts.spec
    curve = ExpertCurve(
        weights=experts.gate_up_form.describe(),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        record_bytes=experts.record_bytes,
        rows=list(ROWS),
        us=[Figure(value=us) for us in more_us],
    )
    bandwidth = native.handle.measure_read_bandwidth(BANDWIDTH_BYTES)
    rate = ReadRate(
        kernel="read",
        num_threads=native.handle.num_threads,
        bytes_per_s=Figure(value=bandwidth),
    )
    return Processor(
        name="this CPU",
        memory_bytes=0,
        read=[rate],
        ops_per_s={},
        start_us=Figure(value=start_us),
        expert_curves=[curve],
    )


def start_and_more_us(
    job_us: Callable[[int, int], float], num_more: int
) -> tuple[float, tuple[float, ...]]:
    """What the first expert of a job costs beyond a further one, and what a further one costs for
    each of ROWS. job_us: of so many experts, with so many rows each. num_more: experts of a job
    beyond the first; 0 where there is but one, whose cost is then all of the job's."""
    start_us, more_us = 0.0, []
    for num_rows in ROWS:
        one_us = each_us = job_us(1, num_rows)
        if num_more:
            each_us = max(0.0, job_us(1 + num_more, num_rows) - one_us) / num_more
        if num_rows == 1:
            start_us = max(0.0, one_us - each_us)
        more_us.append(each_us)
    return start_us, tuple(more_us)


class _Jobs:
    """The experts take turns, so that few find themselves in the processor's caches."""

    def __init__(self, native: NativeRuntime, experts: PackedExperts) -> None:
        self._native = native
        self._experts = experts
        order = torch.randperm(experts.spec.num_experts, generator=torch.Generator().manual_seed(0))
        self._turns = cycle(order.tolist())

    def median_us(self, num_experts: int, num_rows: int) -> float:
        """Of a job in which num_rows rows choose the same num_experts experts."""
        return median(self._us(num_experts, num_rows) for _ in range(NUM_REPEATS))

    def _us(self, num_experts: int, num_rows: int) -> float:
        ids = torch.tensor([next(self._turns) for _ in range(num_experts)])
        ids = ids.expand(num_rows, -1).contiguous()  # [T, K]
        weights = torch.full(ids.shape, 1.0 / num_experts)
        x = torch.ones(num_rows, self._experts.spec.hidden_size)
        out = torch.empty_like(x)
        begun_s = time.perf_counter()
        self._experts.native.run(self._native.handle, x, ids, weights, None, out)
        return (time.perf_counter() - begun_s) * 1e6
