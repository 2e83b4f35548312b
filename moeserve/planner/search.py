"""The settings under which a model serves a load fastest on a machine: found by planning.

What is searched is what a server can choose by itself: how many experts stand in the fast tier and
how much is left for kv, how many tokens a step may have (which is how prefill and decode share it),
and how many threads compute. Everything that was asked for explicitly stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from moeserve.cache.expert_cache import Tier
from moeserve.config import EngineConfig
from moeserve.core import ConfigError
from moeserve.experts.schedule.profile import Profile
from moeserve.planner.deployment import sized
from moeserve.planner.memory import slot_bytes
from moeserve.planner.plan_types import Deployment, Estimate, ModelShape, PlanRequest
from moeserve.planner.simulate.system import simulate_quickly

#: of the memory that there is, what a server should leave to everybody else
MEMORY_SHARE = 0.9
BATCHES = (128, 256, 512, 1024)
#: a setting must be better by so much to be taken instead of the default
WORTH = 0.02


@dataclass(frozen=True)
class Found:
    """The best settings. flags: what differs from those that were given, as on the command line.
    estimate: of the best. tried: deployments that were planned. gain: over the first that fits."""

    engine: EngineConfig
    flags: tuple[str, ...]
    estimate: Estimate
    tried: int
    gain: float


def search(
    request: PlanRequest,
    profile: Profile,
    shape: ModelShape,
    estimate: Callable[[Deployment], Estimate] = simulate_quickly,
) -> Found:
    """The settings with most output tokens per second for the request's traffic.

    One kind of setting after the other, each with the best of those before. Raises ConfigError
    where nothing fits, with the numbers of the smallest.
    """
    best = _first_that_fits(request, profile, shape)
    first = found = estimate(best)
    tried = 1
    for kind in (_slots, _batches, _threads):
        for engine in kind(best, profile, shape):
            other = _deployment(replace(best.request, engine=engine), profile, shape)
            if other is None:
                continue
            tried += 1
            candidate = estimate(other)
            if _speed(candidate) > (1 + WORTH) * _speed(found):
                best, found = other, candidate
    return Found(
        engine=best.request.engine,
        flags=tuple(_flags(request.engine, best.request.engine)),
        estimate=found,
        tried=tried,
        gain=_speed(found) / _speed(first),
    )


def _speed(estimate: Estimate) -> float:
    return estimate.output_tokens_per_s.mid


def _deployment(request: PlanRequest, profile: Profile, shape: ModelShape) -> Deployment | None:
    """None where it cannot be, or has no room."""
    try:
        deployment = sized(request, profile, shape)
    except ConfigError:
        return None  # a setting that this model cannot have is no candidate
    return deployment if _has_room(deployment) else None


def _has_room(deployment: Deployment) -> bool:
    memory = deployment.memory
    return all(
        memory.peak_bytes(tier) <= limit * (MEMORY_SHARE if tier is Tier.HOST else 1.0)
        for tier, limit in memory.limits.items()
    )


def _first_that_fits(request: PlanRequest, profile: Profile, shape: ModelShape) -> Deployment:
    """As asked, else with less kv, else with experts on disk."""
    engine = request.engine
    for candidate in (engine, *_less_kv(request, shape), *_on_disk(request, profile, shape)):
        found = _deployment(replace(request, engine=candidate), profile, shape)
        if found is not None:
            return found
    smallest = sized(request, profile, shape).memory
    wanted = {tier.value: smallest.peak_bytes(tier) for tier in smallest.limits}
    there = {tier.value: limit for tier, limit in smallest.limits.items()}
    raise ConfigError(
        f"memory: no settings fit: {wanted} bytes are wanted, {there} are there",
        field="memory",
        hint="choose a smaller model, or --quantize int4",
    )


def _kv_bytes(request: PlanRequest, shape: ModelShape) -> int:
    """kv of the traffic's own requests."""
    size = request.engine.kv.block_tokens
    running = min(request.traffic.concurrency, request.engine.scheduler.max_running)
    blocks = running * -(-request.traffic.sequence_tokens // size)
    return blocks * size * shape.kv_token_bytes


def _less_kv(request: PlanRequest, shape: ModelShape) -> Iterator[EngineConfig]:
    engine = request.engine
    if engine.kv.num_blocks is None and engine.kv.kv_bytes is None:
        yield replace(engine, kv=replace(engine.kv, kv_bytes=_kv_bytes(request, shape)))


def _on_disk(request: PlanRequest, profile: Profile, shape: ModelShape) -> Iterator[EngineConfig]:
    """As many experts in memory as there is room for, with kv for the requests alone."""
    for engine in _less_kv(request, shape):
        yield from _with_slots(engine, profile, shape, request)
    yield from _with_slots(request.engine, profile, shape, request)


def _with_slots(
    engine: EngineConfig, profile: Profile, shape: ModelShape, request: PlanRequest
) -> Iterator[EngineConfig]:
    tiered = engine.experts.is_tiered or engine.model.device != "cpu"
    if tiered or not shape.packed or not shape.num_experts or not profile.disk:
        return
    fixed = replace(engine, experts=replace(engine.experts, host_slots=2))
    try:
        least = sized(replace(request, engine=fixed), profile, shape).memory
    except ConfigError:
        return
    room = int(profile.cpu.memory_bytes * MEMORY_SHARE) - least.peak_bytes(Tier.HOST)
    slots = 2 + room // slot_bytes(shape)
    if 2 <= slots < shape.num_experts:
        yield replace(engine, experts=replace(engine.experts, host_slots=slots))


def _slots(best: Deployment, profile: Profile, shape: ModelShape) -> Iterator[EngineConfig]:
    """kv for the requests alone, and what that leaves to experts, where both share a memory."""
    engine = best.request.engine
    if best.device_slots is None and best.host_slots is None:
        return
    for smaller in _less_kv(best.request, shape):
        if best.device_slots is not None:
            experts = replace(engine.experts, device_slots=None)
            yield replace(smaller, experts=experts)
            continue
        free = replace(smaller, experts=replace(engine.experts, host_slots=None))
        yield from _with_slots(free, profile, shape, best.request)


def _batches(best: Deployment, profile: Profile, shape: ModelShape) -> Iterator[EngineConfig]:
    """Tokens in a step: more of a prompt at once, or decodes that wait less for it."""
    engine = best.request.engine
    for tokens in BATCHES:
        if tokens != engine.scheduler.max_batch_tokens:
            yield replace(engine, scheduler=replace(engine.scheduler, max_batch_tokens=tokens))


def _threads(best: Deployment, profile: Profile, shape: ModelShape) -> Iterator[EngineConfig]:
    """Where the memory is busy with fewer threads, the others are free for the gateway."""
    engine = best.request.engine
    if engine.experts.num_threads is None:
        counts = sorted({rate.num_threads for rate in profile.cpu.read})
        for count in counts[:-1]:
            yield replace(engine, experts=replace(engine.experts, num_threads=count))


def _flags(given: EngineConfig, best: EngineConfig) -> Iterator[str]:
    """In the words of the command line."""
    for flag, before, after in (
        ("kv-bytes", given.kv.kv_bytes, best.kv.kv_bytes),
        ("host-slots", given.experts.host_slots, best.experts.host_slots),
        ("device-slots", given.experts.device_slots, best.experts.device_slots),
        (
            "max-batch-tokens",
            given.scheduler.max_batch_tokens,
            best.scheduler.max_batch_tokens,
        ),
        ("num-threads", given.experts.num_threads, best.experts.num_threads),
    ):
        if before != after and after is not None:
            yield f"--{flag} {after}"
