"""Figures of the CPU: memory, arithmetic, experts, with our own kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from msgspec import structs

from moeserve.cpu_backend.machine import cpu_model, memory_bytes
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.experts.schedule.profile import ExpertCurve, Figure, Processor, ReadRate
from moeserve.planner.expert_jobs import ExpertJobs, expert_pool
from moeserve.planner.hardware import last_level_cache_bytes
from moeserve.planner.product_figures import measure_products
from moeserve.planner.repeats import Repeats

DOT_TYPES = ("f32", "bf16", "int8")
#: an expert with next to no weights: its job costs what every job costs
SMALL_INTERMEDIATE = 16
#: of the two jobs whose difference is taken
EXPERTS, EXPERTS_OF_MANY_ROWS = (2, 8), (1, 2)
Report = Callable[[str], None]


@dataclass(frozen=True)
class ExpertShape:
    """hidden, intermediate: sizes. form: of the packed weights."""

    hidden_size: int
    intermediate_size: int
    form: PackFormat


@dataclass(frozen=True)
class CpuPlan:
    """What is measured. threads: the numbers of threads for which reads are."""

    shapes: tuple[ExpertShape, ...]
    rows: tuple[int, ...]
    threads: tuple[int, ...]
    repeats: Repeats
    pool_bytes: int


def pool_bytes_here() -> int:
    """Enough that experts are read from memory, and no more than a quarter of what is free."""
    memory = memory_bytes()
    free_bytes = (1 << 30) if memory is None else memory[1] // 4
    return min(max(256 << 20, 2 * last_level_cache_bytes()), free_bytes)


def thread_counts(num_threads: int) -> tuple[int, ...]:
    """1, 2, 4, … and all."""
    powers = [1 << i for i in range(num_threads.bit_length()) if 1 << i < num_threads]
    return (*powers, num_threads)


def measure_cpu(plan: CpuPlan, report: Report) -> Processor:
    runtimes = {count: NativeRuntime(count) for count in plan.threads}
    all_threads = runtimes[max(plan.threads)]
    memory = memory_bytes()
    report("memory")
    read = list(_plain_reads(plan, runtimes))
    report("arithmetic")
    peaks = [partial(all_threads.handle.measure_dot_peak, name, 1) for name in DOT_TYPES]
    ops = dict(zip(DOT_TYPES, plan.repeats.rates(peaks), strict=True))
    report("start of a job")
    start_us = _start_us(plan, all_threads)
    curves: list[ExpertCurve] = []
    for shape in plan.shapes:
        size = f"{shape.hidden_size} x {shape.intermediate_size}"
        report(f"{shape.form.describe()} experts of {size}")
        pool = expert_pool(
            all_threads,
            shape.hidden_size,
            shape.intermediate_size,
            shape.form,
            plan.pool_bytes,
        )
        if not any(curve.weights == shape.form.describe() for curve in curves):
            read += _kernel_reads(plan, runtimes, pool)
        curves.append(_curve(plan, all_threads, pool, shape))
    forms = [shape.form for shape in plan.shapes]
    products = measure_products(
        all_threads, forms, plan.rows, plan.pool_bytes, plan.repeats, report
    )
    return Processor(
        name=f"{cpu_model()}, {all_threads.num_threads} threads, {all_threads.isa}",
        memory_bytes=0 if memory is None else memory[0],
        read=read,
        ops_per_s=ops,
        start_us=start_us,
        expert_curves=curves,
        product_curves=products,
    )


def _plain_reads(plan: CpuPlan, runtimes: dict[int, NativeRuntime]) -> Iterator[ReadRate]:
    measures = [
        partial(runtime.handle.measure_read_bandwidth, plan.pool_bytes, 1)
        for runtime in runtimes.values()
    ]
    for count, rate in zip(runtimes, plan.repeats.rates(measures), strict=True):
        yield ReadRate(kernel="read", num_threads=count, bytes_per_s=rate)


def _kernel_reads(
    plan: CpuPlan, runtimes: dict[int, NativeRuntime], pool: PackedExperts
) -> Iterator[ReadRate]:
    few, many = EXPERTS
    pairs = [ExpertJobs.on(runtime, pool).one_more(1, few, many) for runtime in runtimes.values()]
    for count, us in zip(runtimes, plan.repeats.differences(pairs), strict=True):
        rate = structs.replace(us, value=pool.record_bytes / us.value * 1e6)
        yield ReadRate(kernel=pool.gate_up_form.describe(), num_threads=count, bytes_per_s=rate)


def _start_us(plan: CpuPlan, runtime: NativeRuntime) -> Figure:
    shape = plan.shapes[0]
    pool = expert_pool(runtime, shape.hidden_size, SMALL_INTERMEDIATE, shape.form, 1 << 20)
    jobs = ExpertJobs.on(runtime, pool)
    return plan.repeats.figure(lambda: jobs.us(1, 1))


def _curve(
    plan: CpuPlan, runtime: NativeRuntime, pool: PackedExperts, shape: ExpertShape
) -> ExpertCurve:
    jobs = ExpertJobs.on(runtime, pool)
    # A difference of long times is as well known from few experts as of short ones from many.
    pairs = [
        jobs.one_more(rows, *(EXPERTS if rows <= 16 else EXPERTS_OF_MANY_ROWS))
        for rows in plan.rows
    ]
    us = plan.repeats.differences(pairs)
    return ExpertCurve(
        weights=shape.form.describe(),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        record_bytes=pool.record_bytes,
        rows=list(plan.rows),
        us=us,
    )
