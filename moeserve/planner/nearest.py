"""Plans that must fit, and what would fit instead of one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moeserve.cache.expert_cache import Tier
from moeserve.config import EngineConfig
from moeserve.core import ConfigError, ModelError
from moeserve.experts.schedule.profile import Profile
from moeserve.planner.deployment import sized, traffic_blocks
from moeserve.planner.lookup import find_shape
from moeserve.planner.memory import slot_bytes
from moeserve.planner.plan_types import Deployment, MemoryPlan, PlanRequest
from moeserve.planner.shapes import ModelShape


@dataclass(frozen=True)
class Change:
    """Another request, and how it differs, as flags."""

    flags: str
    request: PlanRequest

    def then(self, flags: str, request: PlanRequest) -> Change:
        """And this, too: named first."""
        return Change(f"{flags} {self.flags}".strip(), request)


class DoesNotFit(ConfigError):
    """A deployment that has no room. plan: its memory. nearest: what would fit; None: nothing."""

    def __init__(self, plan: MemoryPlan, nearest: Change | None) -> None:
        over = [t for t, limit in plan.limits.items() if plan.peak_bytes(t) > limit]
        sizes = "; ".join(
            f"{t.value}: {plan.peak_bytes(t) / 2**30:.2f} GiB wanted, {plan.limits[t] / 2**30:.2f}"
            " GiB there"
            for t in over
        )
        hint = f"nearest that fits: {nearest.flags}" if nearest else "no smaller setting fits"
        super().__init__(f"memory: it does not fit: {sizes}", field="memory", hint=hint)
        self.plan = plan
        self.nearest = nearest


def plan_on(request: PlanRequest, profile: Profile, shape: ModelShape) -> Deployment:
    """Raises ConfigError for settings that contradict each other or the model; DoesNotFit with the
    numbers."""
    deployment = sized(request, profile, shape)
    if not deployment.memory.fits:
        raise DoesNotFit(deployment.memory, nearest_fit(request, profile, shape))
    return deployment


def nearest_fit(request: PlanRequest, profile: Profile, shape: ModelShape) -> Change | None:
    """The first of the smaller settings that has room; they stand in the order of what they cost:
    nothing (less kv), a little quality (fewer bits), speed (fewer experts in a fast tier),
    requests; alone and then together."""
    shapes = {request.engine.model: shape}
    for load in _loads(request):
        for place in (_as_it_is, _fewer_on_device, _fewer_in_memory):
            for stage in _smaller_models(load, shape):
                try:
                    model = stage.request.engine.model
                    if model not in shapes:
                        shapes[model] = find_shape(stage.request.engine)
                    found = place(stage, profile, shapes[model])
                    if sized(found.request, profile, shapes[model]).memory.fits:
                        return found
                except (ConfigError, ModelError):
                    continue  # what this model or machine cannot have is not the nearest
    return None


def _loads(request: PlanRequest) -> Iterator[Change]:
    """The request itself, then with ever fewer sequences that run at once."""
    yield Change("", request)
    running = min(request.traffic.concurrency, request.engine.scheduler.max_running)
    while running > 1:
        running //= 2
        scheduler = replace(request.engine.scheduler, max_running=running)
        fewer = replace(request, engine=replace(request.engine, scheduler=scheduler))
        yield Change(f"--max-running {running}", fewer)


def _smaller_models(load: Change, shape: ModelShape) -> Iterator[Change]:
    """The load itself, then with less kv, and the same for fewer bits."""
    engine = load.request.engine
    widths = [engine.model.quantize]
    if widths == ["none"] and not shape.packed:
        widths += ["int8", "int4"]
    for bits in widths:
        model = replace(engine.model, quantize=bits)
        stage = load
        if bits != widths[0]:
            stage = load.then(f"--quantize {bits}", _with(load.request, model=model))
        yield stage
        yield _with_kv_alone(stage, shape)


def _with_kv_alone(stage: Change, shape: ModelShape) -> Change:
    """In the unit that the pool's size was given in."""
    kv = stage.request.engine.kv
    blocks = traffic_blocks(stage.request)
    kv_bytes = blocks * kv.block_tokens * shape.kv_token_bytes
    flags = f"--kv-bytes {kv_bytes}"
    less = replace(kv, kv_bytes=kv_bytes, num_blocks=None)
    if kv.num_blocks is not None:
        flags, less = f"--num-blocks {blocks}", replace(kv, num_blocks=blocks)
    return Change(f"{stage.flags} {flags}".strip(), _with(stage.request, kv=less))


def _as_it_is(stage: Change, profile: Profile, shape: ModelShape) -> Change:
    return stage


def _fewer_on_device(stage: Change, profile: Profile, shape: ModelShape) -> Change:
    """As many experts there as it has room for, where more were asked for."""
    experts = stage.request.engine.experts
    if experts.device_slots is None or profile.device is None:
        return stage
    most = replace(experts, device_slots=None, device_memory_bytes=profile.device.memory_bytes)
    free = _with(stage.request, experts=most)
    slots = sized(free, profile, shape).device_slots
    if not slots or slots >= experts.device_slots:
        return stage
    fewer = _with(stage.request, experts=replace(experts, device_slots=slots))
    return stage.then(f"--device-slots {slots}", fewer)


def _fewer_in_memory(stage: Change, profile: Profile, shape: ModelShape) -> Change:
    """As many experts in memory as it has room for, the others on disk."""
    stage = _fewer_on_device(stage, profile, shape)
    engine = stage.request.engine
    experts = engine.experts
    if not shape.num_experts or not profile.disk:
        return stage
    given = experts.host_memory_bytes
    if experts.host_slots is None and (engine.model.device == "cpu" or given is not None):
        room = memory_for_weights(stage.request, profile, shape)
        budget = room if given is None else min(room, given)
        tiered = replace(experts, host_memory_bytes=budget)
        return stage.then(f"--host-memory {budget}", _with(stage.request, experts=tiered))
    two = replace(experts, host_slots=2, host_memory_bytes=None)
    least = sized(_with(stage.request, experts=two), profile, shape).memory
    left = profile.cpu.memory_bytes - least.peak_bytes(Tier.HOST)
    most = shape.num_experts if experts.host_slots is None else experts.host_slots
    slots = min(2 + max(0, left // slot_bytes(shape)), most)
    flags = f"--host-slots {slots}"
    if experts.host_slots is None:  # else it is a plan for the CPU
        flags = f"--device {engine.model.device} {flags}"
    return stage.then(flags, _with(stage.request, experts=replace(two, host_slots=slots)))


def memory_for_weights(request: PlanRequest, profile: Profile, shape: ModelShape) -> int:
    """What host memory has room for besides the process and its buffers where experts come from
    disk: weights, kv, experts."""
    experts = replace(request.engine.experts, host_slots=2, host_memory_bytes=None)
    memory = sized(_with(request, experts=experts), profile, shape).memory
    of_model = ("weights", "expert", "kv ")
    others = sum(
        part.num_bytes
        for part in memory.parts
        if part.tier is Tier.HOST and not part.name.startswith(of_model)
    )
    return max(1, profile.cpu.memory_bytes - others)


def _with(request: PlanRequest, **changes: object) -> PlanRequest:
    """With other settings of the engine."""
    engine: EngineConfig = replace(request.engine, **changes)  # type: ignore[arg-type]
    return replace(request, engine=engine)
