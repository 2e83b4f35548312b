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
from moeserve.planner.bound import bound
from moeserve.planner.deployment import sized, traffic_kv_bytes
from moeserve.planner.memory import slot_bytes
from moeserve.planner.plan_types import Deployment, Estimate, PlanRequest
from moeserve.planner.shapes import ModelShape
from moeserve.planner.simulate.system import simulate_quickly

#: of the memory that there is, what a server should leave to everybody else
MEMORY_SHARE = 0.9
BATCHES = (128, 256, 512, 1024)
#: settings that are searched for, unless they were given
SEARCHED = (
    *("kv_bytes", "num_blocks", "max_batch_tokens", "num_threads"),
    *("host_slots", "host_memory_bytes", "device_slots", "device_memory_bytes"),
)
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


def given_of(engine: EngineConfig) -> frozenset[str]:
    """Searched settings that differ from what they are by default: somebody wanted them so."""
    plain = EngineConfig()
    parts = ((engine.kv, plain.kv), (engine.scheduler, plain.scheduler))
    return frozenset(
        name
        for own, default in (*parts, (engine.experts, plain.experts))
        for name in SEARCHED
        if hasattr(own, name) and getattr(own, name) != getattr(default, name)
    )


@dataclass(frozen=True)
class Search:
    """given: names of settings that stay as they are."""

    request: PlanRequest
    profile: Profile
    shape: ModelShape
    given: frozenset[str]

    def first_that_fits(self) -> Deployment:
        """As asked, else with less kv, else with experts on disk."""
        engine = self.request.engine
        for candidate in (engine, *self._less_kv(engine), *self._on_disk(engine)):
            found = self.deployment(candidate)
            if found is not None:
                return found
        smallest = sized(self.request, self.profile, self.shape).memory
        wanted = {tier.value: smallest.peak_bytes(tier) for tier in smallest.limits}
        there = {tier.value: limit for tier, limit in smallest.limits.items()}
        raise ConfigError(
            f"memory: no settings fit: {wanted} bytes are wanted, {there} are there",
            field="memory",
            hint="choose a smaller model, or --quantize int4",
        )

    def deployment(self, engine: EngineConfig) -> Deployment | None:
        """None where it cannot be, or has no room."""
        try:
            found = sized(replace(self.request, engine=engine), self.profile, self.shape)
        except ConfigError:
            return None  # a setting that this model cannot have is no candidate
        return found if _has_room(found) else None

    def slots(self, best: Deployment) -> Iterator[EngineConfig]:
        """kv for the requests alone, and what that leaves to experts, where both share a memory."""
        engine = best.request.engine
        fixed = self.given & {"host_slots", "host_memory_bytes", "device_slots"}
        if fixed or (best.device_slots is None and best.host_slots is None):
            return
        for smaller in self._less_kv(engine):
            if best.device_slots is not None:
                yield smaller
                continue
            experts = replace(engine.experts, host_slots=None)
            yield from self._with_slots(replace(smaller, experts=experts))

    def batches(self, best: Deployment) -> Iterator[EngineConfig]:
        """Tokens in a step: more of a prompt at once, or decodes that wait less for it."""
        engine = best.request.engine
        for tokens in () if "max_batch_tokens" in self.given else BATCHES:
            if tokens != engine.scheduler.max_batch_tokens:
                scheduler = replace(engine.scheduler, max_batch_tokens=tokens)
                yield replace(engine, scheduler=scheduler)

    def threads(self, best: Deployment) -> Iterator[EngineConfig]:
        """Where the memory is busy with fewer threads, the others are free for the gateway."""
        engine = best.request.engine
        counts = sorted({rate.num_threads for rate in self.profile.cpu.read})
        for count in () if "num_threads" in self.given else counts[:-1]:
            yield replace(engine, experts=replace(engine.experts, num_threads=count))

    def _less_kv(self, engine: EngineConfig) -> Iterator[EngineConfig]:
        if not self.given & {"kv_bytes", "num_blocks"}:
            kv_bytes = traffic_kv_bytes(self.request, self.shape)
            yield replace(engine, kv=replace(engine.kv, kv_bytes=kv_bytes))

    def _on_disk(self, engine: EngineConfig) -> Iterator[EngineConfig]:
        """As many experts in memory as there is room for, with kv for the requests alone."""
        for candidate in (*self._less_kv(engine), engine):
            yield from self._with_slots(candidate)

    def _with_slots(self, engine: EngineConfig) -> Iterator[EngineConfig]:
        shape = self.shape
        fixed = self.given & {"host_slots", "host_memory_bytes"}
        elsewhere = engine.model.device != "cpu" or not self.profile.disk
        if fixed or elsewhere or not shape.packed or not shape.num_experts:
            return
        two = replace(engine, experts=replace(engine.experts, host_slots=2))
        try:
            least = sized(replace(self.request, engine=two), self.profile, shape).memory
        except ConfigError:
            return
        memory_bytes = int(self.profile.cpu.memory_bytes * MEMORY_SHARE)
        slots = 2 + (memory_bytes - least.peak_bytes(Tier.HOST)) // slot_bytes(shape)
        if 2 <= slots < shape.num_experts:
            yield replace(engine, experts=replace(engine.experts, host_slots=slots))


def search(
    request: PlanRequest,
    profile: Profile,
    shape: ModelShape,
    given: frozenset[str] | None = None,
    estimate: Callable[[Deployment], Estimate] = simulate_quickly,
) -> Found:
    """The settings with most output tokens per second for the request's traffic.

    given: names of settings that stay, None for those that are not as by default. One kind of
    setting after the other, each with the best of those before. Raises ConfigError where nothing
    fits, with the numbers of the smallest.
    """
    run = Search(request, profile, shape, given_of(request.engine) if given is None else given)
    best = run.first_that_fits()
    first = found = estimate(best)
    tried = 1
    for kind in (run.slots, run.batches, run.threads):
        for engine in kind(best):
            other = run.deployment(engine)
            if other is None:
                continue
            tried += 1
            candidate = estimate(other)
            if _speed(candidate) > (1 + WORTH) * _speed(found):
                best, found = other, candidate
    return Found(
        engine=best.request.engine,
        flags=tuple(_flags(request.engine, best.request.engine)),
        estimate=found.within(bound(best)),
        tried=tried,
        gain=_speed(found) / _speed(first),
    )


def _speed(estimate: Estimate) -> float:
    return estimate.output_tokens_per_s.mid


def _has_room(deployment: Deployment) -> bool:
    memory = deployment.memory
    return all(
        memory.peak_bytes(tier) <= limit * (MEMORY_SHARE if tier is Tier.HOST else 1.0)
        for tier, limit in memory.limits.items()
    )


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
