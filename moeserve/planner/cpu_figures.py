"""Figures of the CPU: memory, arithmetic, experts, with our own kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from msgspec import structs

from moeserve.cpu_backend.machine import cpu_model, memory_bytes
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.experts.schedule.profile import ExpertCurve, Figure, Processor, ProductCurve, ReadRate
from moeserve.planner.expert_jobs import ExpertJobs, expert_pool
from moeserve.planner.hardware import last_level_cache_bytes
from moeserve.planner.product_figures import product_pools
from moeserve.planner.repeats import Measurement, Repeats, limit, usual

DOT_TYPES = ("f32", "bf16", "int8")
#: an expert with next to no weights: its job costs what every job costs
SMALL_INTERMEDIATE = 16
#: of the two jobs whose difference is taken, and of one job of many rows
EXPERTS, EXPERTS_OF_MANY_ROWS = (2, 8), 8
#: from so many on the kernels go through experts another way (csrc/moe.cpp)
MANY_ROWS = 8
Report = Callable[[str], None]
#: of a figure: what it is of, and the threads or rows
Key = tuple[str | int, int | str]


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


def pool_bytes_here(num_pools: int) -> int:
    """Enough that weights are read from memory, and no more than half of what is free for all."""
    memory = memory_bytes()
    free_bytes = (2 << 30) if memory is None else memory[1] // 2
    return min(max(256 << 20, 2 * last_level_cache_bytes()), free_bytes // num_pools)


def thread_counts(num_threads: int) -> tuple[int, ...]:
    """1, 2, 4, … and all."""
    powers = [1 << i for i in range(num_threads.bit_length()) if 1 << i < num_threads]
    return (*powers, num_threads)


def measure_cpu(plan: CpuPlan, report: Report) -> Processor:
    """Everything takes turns: what else runs here for a while meets some samples of each figure."""
    runtimes = {count: NativeRuntime(count) for count in plan.threads}
    everything = runtimes[max(plan.threads)]
    memory = memory_bytes()
    report(f"the CPU: packing {len(plan.shapes)} kinds of experts, and matrices")
    experts = [_pool(everything, shape, plan.pool_bytes) for shape in plan.shapes]
    products = product_pools(everything, [s.form for s in plan.shapes], plan.pool_bytes)
    wanted: dict[Key, Measurement] = {}
    for count, runtime in runtimes.items():
        sample = partial(runtime.handle.measure_read_bandwidth, plan.pool_bytes, 1)
        wanted["read", count] = limit(sample)
        for pool in experts:
            kernel = pool.gate_up_form.describe()
            wanted.setdefault((kernel, count), ExpertJobs.on(runtime, pool).one_more(1, *EXPERTS))
    for name in DOT_TYPES:
        wanted["peak", name] = limit(partial(everything.handle.measure_dot_peak, name, 1))
    start = _start_of_a_job(everything, plan.shapes[0])
    wanted["start", 0] = usual(start)
    for number, pool in enumerate(experts):
        jobs = ExpertJobs.on(everything, pool)
        for rows in plan.rows:
            if rows < MANY_ROWS:
                wanted[number, rows] = jobs.one_more(rows, *EXPERTS)
            else:
                wanted[number, rows] = jobs.one_of(rows, EXPERTS_OF_MANY_ROWS, start)
    for form, matrices in products.items():
        wanted |= {(f"product {form}", rows): matrices.of_rows(rows) for rows in plan.rows}
    report(f"the CPU: memory, arithmetic, experts and products, {len(wanted)} figures")
    figures = dict(zip(wanted, plan.repeats.measure(list(wanted.values())), strict=True))
    return Processor(
        name=f"{cpu_model()}, {everything.num_threads} threads, {everything.isa}",
        memory_bytes=0 if memory is None else memory[0],
        read=list(_reads(figures, runtimes, experts)),
        ops_per_s={name: figures["peak", name] for name in DOT_TYPES},
        start_us=figures["start", 0],
        expert_curves=[
            ExpertCurve(
                weights=shape.form.describe(),
                hidden_size=shape.hidden_size,
                intermediate_size=shape.intermediate_size,
                record_bytes=pool.record_bytes,
                rows=list(plan.rows),
                us=[figures[number, rows] for rows in plan.rows],
            )
            for number, (shape, pool) in enumerate(zip(plan.shapes, experts, strict=True))
        ],
        product_curves=[
            ProductCurve(
                weights=form,
                rows=list(plan.rows),
                ps=[figures[f"product {form}", rows] for rows in plan.rows],
            )
            for form in products
        ],
    )


def _pool(runtime: NativeRuntime, shape: ExpertShape, pool_bytes: int) -> PackedExperts:
    return expert_pool(runtime, shape.hidden_size, shape.intermediate_size, shape.form, pool_bytes)


def _start_of_a_job(runtime: NativeRuntime, shape: ExpertShape) -> Callable[[], float]:
    pool = expert_pool(runtime, shape.hidden_size, SMALL_INTERMEDIATE, shape.form, 1 << 20)
    return partial(ExpertJobs.on(runtime, pool).us, 1, 1)


def _reads(
    figures: Mapping[Key, Figure], counts: Iterable[int], experts: Sequence[PackedExperts]
) -> Iterator[ReadRate]:
    """Loads alone, then the kernel of each format with one row."""
    for count in counts:
        yield ReadRate(kernel="read", num_threads=count, bytes_per_s=figures["read", count])
    records = {pool.gate_up_form.describe(): pool.record_bytes for pool in reversed(experts)}
    for kernel, record_bytes in reversed(records.items()):
        for count in counts:
            us = figures[kernel, count]
            rate = structs.replace(us, value=record_bytes / us.value * 1e6)
            yield ReadRate(kernel=kernel, num_threads=count, bytes_per_s=rate)
