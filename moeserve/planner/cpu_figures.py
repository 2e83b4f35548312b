"""Figures of the CPU: memory, arithmetic, experts, with our own kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from msgspec import structs

from moeserve.cpu_backend.machine import cpu_model, memory_bytes
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, PackFormat
from moeserve.experts.schedule.profile import ExpertCurve, Figure, Processor, ProductCurve, ReadRate
from moeserve.planner.expert_jobs import EXPERTS, ExpertJobs, expert_pool
from moeserve.planner.hardware import last_level_cache_bytes
from moeserve.planner.product_figures import SMALL_SIZE, Kind, Pool, per_head_pools, product_pools
from moeserve.planner.repeats import Measurement, Repeats, limit, usual

DOT_TYPES = ("f32", "bf16", "int8")
#: hidden and intermediate size of the small experts (schedule/product_sizes.py)
SMALL_EXPERT = (1024, 256)
#: an expert with next to no weights: its job costs what every job costs
SMALL_INTERMEDIATE = 16
#: of a job of many rows
EXPERTS_OF_MANY_ROWS = EXPERTS[1]
#: read once to know the rate of memory
RATE_BYTES = 256 << 20
#: from so many on the kernels go through experts another way (csrc/moe.cpp)
MANY_ROWS = 8
Report = Callable[[str], None]


@dataclass(frozen=True)
class ExpertShape:
    """hidden, intermediate: sizes. form: of the packed weights."""

    hidden_size: int
    intermediate_size: int
    form: PackFormat


@dataclass(frozen=True)
class CpuPlan:
    """What is measured. small_rows: for which small experts and matrices are, in the formats of
    shapes. threads: the numbers of threads for which reads are."""

    shapes: tuple[ExpertShape, ...]
    rows: tuple[int, ...]
    small_rows: tuple[int, ...]
    threads: tuple[int, ...]
    repeats: Repeats
    pool_bytes: int


#: and what is measured of them, for so many rows
ExpertKinds = dict[ExpertShape, tuple[PackedExperts, tuple[int, ...]]]
ProductKinds = dict[Kind, tuple[Pool, tuple[int, ...]]]
#: of a figure: what it is of, and the threads or rows
Key = tuple[str | ExpertShape | Kind, int | str]


def pool_bytes_here(num_pools: int, num_threads: int, turn_s: float) -> int:
    """Enough that weights are read from memory: more than caches hold, unless a turn reads less,
    since from turn to turn everything else is read. No more than half of what is free for all."""
    memory = memory_bytes()
    free_bytes = (2 << 30) if memory is None else memory[1] // 2
    rate = NativeRuntime(num_threads).handle.measure_read_bandwidth(RATE_BYTES, 1)
    enough = max(RATE_BYTES, min(2 * last_level_cache_bytes(), round(rate * turn_s)))
    return min(enough, free_bytes // num_pools)


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
    experts = _expert_kinds(everything, plan)
    products = _product_kinds(everything, plan)
    wanted: dict[Key, Measurement] = {}
    memory_read = experts[plan.shapes[0]][0].records.reshape(-1)
    for count, runtime in runtimes.items():
        wanted["read", count] = limit(partial(runtime.handle.measure_reading, memory_read))
        for kernel, pool in _by_format(experts).items():
            wanted[kernel, count] = ExpertJobs.on(runtime, pool).one_more(1, *EXPERTS)
    for name in DOT_TYPES:
        wanted["peak", name] = limit(partial(everything.handle.measure_dot_peak, name, 1))
    start = _start_of_a_job(everything, plan.shapes[0])
    wanted["start", 0] = usual(start)
    for shape, (pool, counts) in experts.items():
        jobs = ExpertJobs.on(everything, pool)
        for rows in counts:
            if rows < MANY_ROWS:
                wanted[shape, rows] = jobs.one_more(rows, *EXPERTS)
            else:
                wanted[shape, rows] = jobs.one_of(rows, EXPERTS_OF_MANY_ROWS, start)
    for kind, (matrices, counts) in products.items():
        wanted |= {(kind, rows): matrices.of_rows(rows) for rows in counts}
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
                rows=list(counts),
                us=[figures[shape, rows] for rows in counts],
            )
            for shape, (pool, counts) in experts.items()
        ],
        product_curves=[
            ProductCurve(
                weights=kind.weights,
                outputs=kind.outputs,
                inputs=kind.inputs,
                rows=list(counts),
                ps=[figures[kind, rows] for rows in counts],
            )
            for kind, (_, counts) in products.items()
        ],
    )


def _expert_kinds(runtime: NativeRuntime, plan: CpuPlan) -> ExpertKinds:
    """What is asked for, then small ones of the same formats."""
    rows = dict.fromkeys(plan.shapes, plan.rows)
    for shape in plan.shapes:
        rows.setdefault(ExpertShape(*SMALL_EXPERT, shape.form), plan.small_rows)
    return {shape: (_pool(runtime, shape, plan.pool_bytes), rows[shape]) for shape in rows}


def _product_kinds(runtime: NativeRuntime, plan: CpuPlan) -> ProductKinds:
    forms = [shape.form for shape in plan.shapes]
    mid = product_pools(runtime, forms, plan.pool_bytes) | per_head_pools(forms, plan.pool_bytes)
    small = product_pools(runtime, forms, plan.pool_bytes, SMALL_SIZE)
    kinds: ProductKinds = {kind: (pool, plan.rows) for kind, pool in mid.items()}
    return kinds | {kind: (pool, plan.small_rows) for kind, pool in small.items()}


def _by_format(experts: ExpertKinds) -> dict[str, PackedExperts]:
    """The first of each."""
    found: dict[str, PackedExperts] = {}
    for shape, (pool, _) in experts.items():
        found.setdefault(shape.form.describe(), pool)
    return found


def _pool(runtime: NativeRuntime, shape: ExpertShape, pool_bytes: int) -> PackedExperts:
    return expert_pool(runtime, shape.hidden_size, shape.intermediate_size, shape.form, pool_bytes)


def _start_of_a_job(runtime: NativeRuntime, shape: ExpertShape) -> Callable[[], float]:
    pool = expert_pool(runtime, shape.hidden_size, SMALL_INTERMEDIATE, shape.form, 1 << 20)
    return partial(ExpertJobs.on(runtime, pool).us, 1, 1)


def _reads(
    figures: Mapping[Key, Figure], counts: Iterable[int], experts: ExpertKinds
) -> Iterator[ReadRate]:
    """Loads alone, then the kernel of each format with one row."""
    for count in counts:
        yield ReadRate(kernel="read", num_threads=count, bytes_per_s=figures["read", count])
    for kernel, pool in _by_format(experts).items():
        for count in counts:
            us = figures[kernel, count]
            rate = structs.replace(us, value=pool.record_bytes / us.value * 1e6)
            yield ReadRate(kernel=kernel, num_threads=count, bytes_per_s=rate)
