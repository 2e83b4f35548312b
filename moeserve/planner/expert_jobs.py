"""Expert jobs on the real backend, for timing: many experts in memory, few of them in a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch

from moeserve.core import ExpertSpec, Routing
from moeserve.cpu_backend.backend import CpuBackend, ExpertJob
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.planner.repeats import MOST_TOGETHER, Measurement, differing

#: inputs under one scale in a checkpoint's own codes (packing.py)
MXFP4_GROUP, FP8_GROUP = 32, 128


#: in a job, and in the other of the two whose difference is taken
EXPERTS = (2, 8)
#: of a pool: that a turn of samples runs through
MOST_EXPERTS = sum(EXPERTS) * MOST_TOGETHER


def expert_pool(
    runtime: NativeRuntime, hidden_size: int, intermediate_size: int, form: PackFormat,
    pool_bytes: int,
) -> PackedExperts:  # fmt: skip
    """As many experts as fill pool_bytes or as a turn reads, at least 16. All have the same
    numbers, each at its own place in memory: packing more takes longer than all that is
    measured."""
    spec = ExpertSpec(num_experts=2, hidden_size=hidden_size, intermediate_size=intermediate_size)
    record_bytes = PackedExperts.bytes_of_record(spec, form, form)
    spec = ExpertSpec(
        num_experts=max(16, min(MOST_EXPERTS, pool_bytes // record_bytes)),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
    )
    pool = PackedExperts(runtime.handle, spec, form)
    _put_expert(pool, hidden_size, intermediate_size, form)
    pool.records[1:] = pool.records[0]
    return pool


def _put_expert(pool: PackedExperts, hidden: int, inner: int, form: PackFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up_rows, down_rows = torch.arange(2 * inner), torch.arange(hidden)
    if not form.holds_codes:
        gate_up = torch.randn(2 * inner, hidden, generator=generator) / hidden**0.5
        down = torch.randn(hidden, inner, generator=generator) / inner**0.5
        pool.put_gate_up(0, gate_up_rows, gate_up)
        pool.put_down(0, down_rows, down)
        return
    for put, rows, cols in (
        (pool.put_gate_up_codes, gate_up_rows, hidden),
        (pool.put_down_codes, down_rows, inner),
    ):
        shape = (len(rows), cols // 2 if form.name == "mxfp4" else cols)
        # No sign and no highest exponent, among whose codes is NaN.
        codes = torch.randint(0, 120, shape, generator=generator, dtype=torch.uint8)
        if form.name == "mxfp4":
            scales = torch.full((len(rows), cols // MXFP4_GROUP), 120, dtype=torch.uint8)
        else:
            scales = torch.full((len(rows), -(-cols // FP8_GROUP)), 1 / 64)
        put(0, rows, codes, scales)


class ExpertJobs:
    """Times jobs on a pool. No job finds its experts in the processor's caches because the one
    before has read them: they take turns in a shuffled order."""

    def __init__(self, backend: CpuBackend, pool: PackedExperts, dtype: torch.dtype) -> None:
        """dtype: of the rows."""
        self._backend = backend
        self._spec = pool.spec
        self._dtype = dtype
        backend.add_layer(0, pool.spec, pool)
        self._generator = torch.Generator().manual_seed(0)
        order = torch.randperm(pool.spec.num_experts, generator=self._generator)
        self._turns: Iterator[int] = cycle(order.tolist())

    @classmethod
    def on(cls, runtime: NativeRuntime, pool: PackedExperts) -> ExpertJobs:
        dtype = torch.float32 if pool.gate_up_form.name == "float32" else torch.bfloat16
        return cls(NativeBackend(runtime), pool, dtype)

    def us(self, num_experts: int, num_rows: int) -> float:
        """One job in which num_rows rows choose the same num_experts experts."""
        experts = [next(self._turns) for _ in range(num_experts)]
        ids = torch.tensor(experts).expand(num_rows, -1).contiguous()  # [T, K]
        weights = torch.full(ids.shape, 1.0 / num_experts)
        x = torch.randn(num_rows, self._spec.hidden_size, generator=self._generator)
        x = x.to(self._dtype)
        job = ExpertJob(0, x, Routing(ids, weights), out_dtype=self._dtype)
        started_s = time.perf_counter()
        self._backend.run(job)
        return (time.perf_counter() - started_s) * 1e6

    def one_more(self, num_rows: int, few: int, many: int) -> Measurement:
        """What one more expert adds to a job: so that what every job costs once is left out."""
        more, less = partial(self.us, many, num_rows), partial(self.us, few, num_rows)
        return differing(more, less, many - few)

    def one_of(self, num_rows: int, count: int, start: Callable[[], float]) -> Measurement:
        """What each of `count` experts takes in a job, without what `start` says that every job
        costs: where experts take long, that is less noise than a second job of some of them; and as
        many experts together are computed as in a step's prompts."""
        return differing(partial(self.us, count, num_rows), start, count)
