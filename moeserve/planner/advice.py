"""What would help, and by how much: the same plan again with one thing changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from msgspec import structs

from moeserve.core import ConfigError, ModelError
from moeserve.experts.schedule.profile import Figure, Processor, Profile
from moeserve.planner.deployment import sized
from moeserve.planner.lookup import find_shape
from moeserve.planner.plan_types import Advice, Deployment, Estimate, PlanRequest
from moeserve.planner.second_process import second_process
from moeserve.planner.step_costs import on_other_cpu

#: of a change of hardware
TWICE = 2.0
#: a factor this close to 1 is none
NO_EFFECT = 0.02
#: seconds of one estimate from which on a second process is worth its start
LONG_S = 0.5
Estimator = Callable[[Deployment], Estimate]


@dataclass(frozen=True)
class Trial:
    """A change of the request, or of the hardware: then a profile to use instead. beyond: the words
    of the change that this one goes further than."""

    words: str
    flags: str
    request: PlanRequest
    profile: Profile
    beyond: str | None = None


def advise(deployment: Deployment, estimate: Estimator) -> list[Advice]:
    """Every change that can be made, ranked by output tokens per second, the best first.

    A change that this model or machine cannot have is left out. Changes that do not fit are named
    with what they would bring. estimate: where it takes long, a second process shares the work, so
    it must be a function of a module.
    """
    began_s = time.perf_counter()
    now = estimate(deployment).output_tokens_per_s.mid
    takes_long = time.perf_counter() - began_s > LONG_S
    try_one = partial(_tried, deployment, estimate, now)
    every = list(trials(deployment))
    found: dict[int, Advice | None] = {}
    with ExitStack() as stack:
        beside: dict[int, Future[Advice | None]] = {}
        in_a_row = {trial.beyond for trial in every} - {None}
        alone = [n for n, t in enumerate(every) if t.beyond is None and t.words not in in_a_row]
        if takes_long and (executor := second_process(stack)) is not None:
            beside = {n: executor.submit(try_one, every[n]) for n in alone}
        for number, trial in enumerate(every):
            if number in alone:
                continue
            if trial.beyond is not None and any(
                advice is not None
                and advice.change == trial.beyond
                and advice.factor < 1 + NO_EFFECT
                for advice in found.values()
            ):
                continue  # what brings nothing brings nothing twice, and takes longest to plan
            found[number] = try_one(trial)
        for number in reversed(alone):  # the other process comes from the front
            future = beside.get(number)
            if future is None or future.cancel():
                found[number] = try_one(every[number])
            else:
                found[number] = future.result()
    in_order = [advice for _, advice in sorted(found.items()) if advice is not None]
    return sorted(in_order, key=lambda advice: (not advice.fits, -advice.factor))


def _tried(deployment: Deployment, estimate: Estimator, now: float, trial: Trial) -> Advice | None:
    """now: tokens per second without the change. None: it is not to be had here."""
    try:
        shape = deployment.shape
        if trial.request.engine.model != deployment.request.engine.model:
            shape = find_shape(trial.request.engine)
        changed = sized(trial.request, trial.profile, shape)
        factor = 1.0
        if not _is_alike(deployment, changed):
            factor = estimate(changed).output_tokens_per_s.mid / now
    except (ConfigError, ModelError):
        return None  # no fallback, one line less
    return Advice(trial.words, trial.flags, factor, changed.memory.fits)


def _is_alike(one: Deployment, other: Deployment) -> bool:
    """Whether they differ in nothing that takes time: in the memory that there is at most."""

    def what_counts(deployment: Deployment) -> tuple[object, ...]:
        profile = deployment.profile
        cpu = structs.replace(profile.cpu, memory_bytes=0)
        slots = deployment.host_slots, deployment.device_slots, deployment.num_kv_blocks
        return structs.replace(profile, cpu=cpu), slots, deployment.request

    return what_counts(one) == what_counts(other)


def trials(deployment: Deployment) -> Iterator[Trial]:
    """Settings first, then more hardware."""
    yield from _settings(deployment)
    yield from _hardware(deployment)


def _settings(deployment: Deployment) -> Iterator[Trial]:
    request, profile, shape = deployment.request, deployment.profile, deployment.shape
    engine, traffic = request.engine, request.traffic

    def trial(words: str, flags: str, **changes: object) -> Trial:
        changed = replace(request, engine=replace(engine, **changes))  # type: ignore[arg-type]
        return Trial(words, flags, changed, profile)

    if engine.model.quantize != "int4" and not shape.packed:
        for bits in ("int8", "int4"):
            if bits != engine.model.quantize:
                flags = f"--quantize {bits}"
                yield trial(f"{bits} weights", flags, model=replace(engine.model, quantize=bits))
    beyond = None
    for factor in (2, 4):
        count, words = traffic.concurrency * factor, f"{factor} times the requests"
        more = replace(request, traffic=replace(traffic, concurrency=count))
        yield Trial(words, f"--concurrency {count}", more, profile, beyond)
        beyond = words
    slots = deployment.host_slots
    if slots is not None and slots < shape.num_experts:
        more_slots = min(2 * slots, shape.num_experts)
        experts = replace(engine.experts, host_slots=more_slots, host_memory_bytes=None)
        yield trial("twice the experts in memory", f"--host-slots {more_slots}", experts=experts)
        experts = replace(engine.experts, host_slots=None, host_memory_bytes=None)
        plain = replace(experts, policy="auto", predictor="none", predictor_file=None)
        yield trial("all experts in memory", "without --host-memory", experts=plain)
    num_cores = profile.hardware.num_cores
    if deployment.num_threads < num_cores:
        experts = replace(engine.experts, num_threads=num_cores)
        yield trial("every core", f"--num-threads {num_cores}", experts=experts)
    batch = engine.scheduler.max_batch_tokens
    if batch < traffic.prompt_tokens * traffic.concurrency:
        scheduler = replace(engine.scheduler, max_batch_tokens=4 * batch)
        yield trial("larger batches", f"--max-batch-tokens {4 * batch}", scheduler=scheduler)
    kv_bytes = 2 * deployment.num_kv_blocks * engine.kv.block_tokens * shape.kv_token_bytes
    kv = replace(engine.kv, kv_bytes=kv_bytes, num_blocks=None)
    yield trial("twice the kv", f"--kv-bytes {kv_bytes}", kv=kv)


def _hardware(deployment: Deployment) -> Iterator[Trial]:
    request, profile = deployment.request, deployment.profile
    engine = request.engine

    def trial(words: str, changed: Profile, more: PlanRequest = request) -> Trial:
        return Trial(words, "", more, changed)

    bigger = structs.replace(profile.cpu, memory_bytes=2 * profile.cpu.memory_bytes)
    budget = engine.experts.host_memory_bytes
    with_budget = request
    if budget is not None:
        experts = replace(engine.experts, host_memory_bytes=2 * budget)
        with_budget = replace(request, engine=replace(engine, experts=experts))
    yield trial("twice the RAM", structs.replace(profile, cpu=bigger), with_budget)
    cpu = profile.cpu
    yield trial("twice the memory bandwidth", on_other_cpu(profile, _faster_reads(cpu)))
    yield trial("twice the CPU's arithmetic", on_other_cpu(profile, _faster_peaks(cpu)))
    if deployment.host_slots is not None:
        disk = [structs.replace(p, bytes_per_s=_times(p.bytes_per_s, TWICE)) for p in profile.disk]
        yield trial("a disk twice as fast", structs.replace(profile, disk=disk))
    if deployment.device_slots is not None and profile.device is not None:
        link = [structs.replace(p, us=_times(p.us, 1 / TWICE)) for p in profile.link]
        yield trial("a link twice as fast", structs.replace(profile, link=link))
        device = profile.device
        bigger = structs.replace(device, memory_bytes=2 * device.memory_bytes)
        experts = engine.experts
        if experts.device_memory_bytes is not None:
            experts = replace(experts, device_memory_bytes=2 * experts.device_memory_bytes)
        elif experts.device_slots is not None:
            experts = replace(experts, device_slots=2 * experts.device_slots)
        more = replace(request, engine=replace(engine, experts=experts))
        yield trial("twice the device's memory", structs.replace(profile, device=bigger), more)
        fast = structs.replace(profile, device=_faster_reads(_faster_peaks(device)))
        yield trial("a device twice as fast", fast)


def _faster_reads(processor: Processor) -> Processor:
    read = [
        structs.replace(rate, bytes_per_s=_times(rate.bytes_per_s, TWICE))
        for rate in processor.read
    ]
    return with_curves(structs.replace(processor, read=read), 1 / TWICE, 1.0)


def _faster_peaks(processor: Processor) -> Processor:
    peaks = {name: _times(figure, TWICE) for name, figure in processor.ops_per_s.items()}
    return with_curves(structs.replace(processor, ops_per_s=peaks), 1.0, 1 / TWICE)


def with_curves(processor: Processor, reading: float, multiplying: float) -> Processor:
    """Measured times by rows scaled: what one row takes is reading, what more is multiplying."""

    def scaled(figures: list[Figure]) -> list[Figure]:
        one = figures[0].value
        return [
            structs.replace(f, value=one * reading + max(0.0, f.value - one) * multiplying)
            for f in figures
        ]

    return structs.replace(
        processor,
        expert_curves=[structs.replace(c, us=scaled(c.us)) for c in processor.expert_curves],
        product_curves=[structs.replace(c, ps=scaled(c.ps)) for c in processor.product_curves],
    )


def _times(figure: Figure, factor: float) -> Figure:
    return structs.replace(figure, value=figure.value * factor)


def words_of(advice: Sequence[Advice]) -> list[str]:
    """One line each: `int4 weights (--quantize int4): 1.7x`."""
    lines = []
    for each in advice:
        flags = f" ({each.flags})" if each.flags else ""
        effect = f"{each.factor:.2f}x"
        if abs(each.factor - 1) <= NO_EFFECT:
            effect = "no effect"
        lines.append(f"{each.change}{flags}: {effect}{'' if each.fits else ', does not fit'}")
    return lines
