"""From a request to a deployment: everything checked, everything sized, nothing loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moeserve import __version__
from moeserve.cache.expert_cache import Tier
from moeserve.config import EngineConfig
from moeserve.core import ConfigError
from moeserve.engine.kv_limit import num_kv_blocks
from moeserve.experts.schedule.profile import (
    Profile,
    check_profile,
    profile_names,
    read_profile,
    shipped_profile,
)
from moeserve.planner.memory import Room, memory_plan, slot_bytes, workspace_bytes
from moeserve.planner.model_shape import read_shape
from moeserve.planner.plan_types import (
    Deployment,
    MemoryPlan,
    ModelShape,
    PlanRequest,
    Traffic,
)

#: of a process without a model where nobody measured it: as on our own test machine
ASSUMED_PROCESS_BYTES = 257 << 20


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


@dataclass(frozen=True)
class Change:
    """Another request, and how it differs: in words and as flags."""

    words: str
    flags: str
    request: PlanRequest


def plan_on(request: PlanRequest, profile: Profile, shape: ModelShape) -> Deployment:
    """Raises ConfigError for settings that contradict each other or the model; DoesNotFit with the
    numbers."""
    deployment = sized(request, profile, shape)
    if not deployment.memory.fits:
        raise DoesNotFit(deployment.memory, nearest_fit(request, profile, shape))
    return deployment


def find_shape(engine: EngineConfig) -> ModelShape:
    """The model's sizes: of a config.json, a local directory, or a hub id."""
    path = Path(engine.model.model).expanduser()
    if not path.is_file() and (not path.is_dir() or engine.model.revision is not None):
        from moeserve.environment import read_environment
        from moeserve.models.hub import resolve_model  # half a second that a file does not take

        path = resolve_model(engine.model, read_environment())
    native = engine.model.device == "cpu" or engine.model.device == "emulated"
    native = native and engine.experts.cpu_backend in ("auto", "native")
    return read_shape(engine.model, path, native and engine.model.dtype != "float16")


def find_hardware(name: str | None, foreign: bool = False) -> Profile:
    """name: of a shipped profile or a file; None: this machine's own. foreign: a profile that was
    measured on another machine is wanted.

    Raises ConfigError for a profile that is not there, broken, stale, or of another machine.
    """
    from moeserve.planner.hardware import default_profile_path, this_hardware

    shipped = profile_names()
    if name in shipped:
        return shipped_profile(name)
    path = default_profile_path() if name is None else Path(name)
    if not path.exists():
        what = "this machine was not calibrated" if name is None else f"{name!r} is no file"
        raise ConfigError(
            f"hardware: {what}, and the profiles that come with the package are"
            f" {', '.join(shipped)}",
            field="hardware",
            hint="run `moeserve calibrate`, or name one of them with --hardware",
        )
    profile = read_profile(path)
    if profile.source == "measured" and not foreign:
        check_profile(profile, this_hardware(), __version__, str(path))
    return profile


def sized(request: PlanRequest, profile: Profile, shape: ModelShape) -> Deployment:
    """Whether it fits or not. Raises ConfigError for what contradicts itself or the model."""
    check_traffic(request.traffic, shape)
    engine = request.engine
    block_bytes = shape.kv_token_bytes * engine.kv.block_tokens
    num_blocks = num_kv_blocks(engine, block_bytes, shape.rest_bytes, shape.context_tokens)
    per_sequence = -(-(request.traffic.sequence_tokens - 1) // engine.kv.block_tokens)
    if per_sequence > num_blocks:
        raise ConfigError(
            f"kv_bytes: one request of {request.traffic.sequence_tokens} tokens needs"
            f" {per_sequence} kv blocks, the pool has {num_blocks}",
            field="kv_bytes",
            hint="raise --kv-bytes, or plan for shorter requests",
        )
    running = min(request.traffic.concurrency, engine.scheduler.max_running)
    num_threads = engine.experts.num_threads or profile.hardware.num_cores
    process = profile.process_bytes
    longest = running * max(request.traffic.prompt_tokens, 1)
    room = Room(
        base_bytes=ASSUMED_PROCESS_BYTES if process is None else int(process.value),
        num_kv_blocks=num_blocks,
        used_blocks=min(running * per_sequence, num_blocks),
        block_tokens=engine.kv.block_tokens,
        host_slots=None,
        device_slots=None,
        max_rows=max(min(engine.scheduler.max_batch_tokens, longest), running),
        sampled_rows=running,
        num_threads=num_threads,
        huge_pages=_huge_pages(profile),
    )
    limits = {Tier.HOST: profile.cpu.memory_bytes}
    if engine.model.device == "cpu":
        room = replace(room, host_slots=_host_slots(engine, shape, room))
    else:
        limits[Tier.DEVICE] = _device_bytes(profile)
        room = replace(room, device_slots=_device_slots(engine, shape, room, limits[Tier.DEVICE]))
        room = replace(room, host_slots=_host_slots(engine, shape, room))
    return Deployment(
        request=request,
        shape=shape,
        profile=profile,
        memory=memory_plan(shape, room, limits),
        num_kv_blocks=num_blocks,
        host_slots=room.host_slots,
        device_slots=room.device_slots,
        num_threads=num_threads,
    )


def check_traffic(traffic: Traffic, shape: ModelShape) -> None:
    """ConfigError for a load that is none, or longer than the model's context."""
    for name in ("concurrency", "prompt_tokens", "output_tokens"):
        value = getattr(traffic, name)
        if value < 1:
            raise ConfigError(f"{name}: {value} is below the minimum 1", field=name)
    if traffic.sequence_tokens > shape.context_tokens:
        raise ConfigError(
            f"context: {traffic.prompt_tokens} prompt and {traffic.output_tokens} output tokens"
            f" exceed the context of {shape.context_tokens}",
            field="context_tokens",
            hint="plan for shorter requests, or raise --context up to the model's own",
        )


def _huge_pages(profile: Profile) -> bool:
    """Of a machine that is not at hand we assume what Linux does by default."""
    from moeserve.planner.process_memory import uses_huge_pages

    return profile.source != "measured" or uses_huge_pages()


def _host_slots(engine: EngineConfig, shape: ModelShape, room: Room) -> int | None:
    """Of the host tier over the disk; None where all experts are resident."""
    experts = engine.experts
    if not experts.is_tiered:
        return None
    if not shape.num_experts:
        raise ConfigError(
            f"host_memory: {shape.name} has no experts that could stay on disk",
            field="host_memory_bytes",
            hint="leave it out",
        )
    if experts.host_slots is not None:
        if experts.host_slots > shape.num_experts:
            raise ConfigError(
                f"host_slots: {experts.host_slots} is more than the model's"
                f" {shape.num_experts} experts",
                field="host_slots",
            )
        return experts.host_slots
    block_bytes = room.block_tokens * shape.kv_token_bytes
    budget, record = experts.host_memory_bytes or 0, slot_bytes(shape)
    most_kv, least_slots = room.num_kv_blocks * block_bytes, experts.min_host_slots
    least = shape.rest_bytes + most_kv + least_slots * record
    if budget < least:
        raise ConfigError(
            f"host_memory: {budget} bytes; weights of every token take {shape.rest_bytes}, kv up to"
            f" {most_kv}, and {least_slots} experts {least_slots * record}: at least {least}",
            field="host_memory_bytes",
            hint="raise --host-memory, lower --kv-bytes, or pack the model with fewer bits",
        )
    slots = (budget - shape.rest_bytes - room.used_blocks * block_bytes) // record
    return int(min(slots, shape.num_experts))


def _device_bytes(profile: Profile) -> int:
    if profile.device is None:
        raise ConfigError(
            f"device: {profile.hardware.cpu} has no device in its profile",
            field="device",
            hint=f"leave out --device, or name a profile with one: {', '.join(profile_names())}",
        )
    return profile.device.memory_bytes


def _device_slots(engine: EngineConfig, shape: ModelShape, room: Room, limit: int) -> int:
    """As asked, but no more than there are experts; else what the device has room for."""
    if engine.experts.device_slots is not None:
        return min(engine.experts.device_slots, shape.num_experts)
    kv_bytes = room.num_kv_blocks * room.block_tokens * shape.kv_token_bytes
    workspace = workspace_bytes(shape, replace(room, device_slots=0))
    left = limit - shape.rest_bytes - kv_bytes - 2 * workspace
    wanted = engine.experts.device_memory_bytes
    room_bytes = left if wanted is None else min(left, wanted)
    record = slot_bytes(shape)
    return max(0, min(room_bytes // record, shape.num_experts)) if record else 0


def nearest_fit(request: PlanRequest, profile: Profile, shape: ModelShape) -> Change | None:
    """The first of the smaller settings that has room; they stand in the order of what they cost:
    nothing, a little quality, speed, requests."""
    for change in smaller_settings(request, profile, shape):
        try:
            other = shape
            if change.request.engine.model != request.engine.model:
                other = find_shape(change.request.engine)
            if sized(change.request, profile, other).memory.fits:
                return change
        except ConfigError:
            continue  # a setting that this model or machine cannot have is not the nearest
    return None


def memory_for_weights(request: PlanRequest, profile: Profile, shape: ModelShape) -> int:
    """What host memory has room for besides the process and its buffers: weights, kv, experts."""
    memory = sized(request, profile, shape).memory
    of_model = ("weights", "expert", "kv ")
    others = sum(
        part.num_bytes
        for part in memory.parts
        if part.tier is Tier.HOST and not part.name.startswith(of_model)
    )
    return max(1, profile.cpu.memory_bytes - others)


def smaller_settings(request: PlanRequest, profile: Profile, shape: ModelShape) -> Iterator[Change]:
    """Less kv, fewer bits, experts on disk, fewer requests; alone and then together."""
    stages = list(_smaller_models(request, shape))
    yield from stages[1:]
    if shape.num_experts and profile.disk and not request.engine.experts.is_tiered:
        for stage in stages:
            yield _on_disk(stage, profile, shape)
    running = min(request.traffic.concurrency, request.engine.scheduler.max_running)
    while running > 1:
        running //= 2
        traffic = replace(request.traffic, concurrency=running)
        fewer = _with_kv_alone(replace(request, traffic=traffic), shape)
        flags = f"--concurrency {running} {fewer.flags}"
        yield Change("fewer requests", flags, fewer.request)


def _on_disk(stage: Change, profile: Profile, shape: ModelShape) -> Change:
    """As many experts in memory as there is room for. Sizes are those of the model as it is given:
    with fewer bits more would fit."""
    engine = stage.request.engine
    room = memory_for_weights(stage.request, profile, shape)
    if engine.model.device == "cpu":
        flags = f"--host-memory {room}"
        experts = replace(engine.experts, host_memory_bytes=room)
    else:
        slots = min(max(2, room // slot_bytes(shape)), shape.num_experts)
        flags = f"--device {engine.model.device} --host-slots {slots}"
        experts = replace(engine.experts, host_slots=slots)
    tiered = replace(stage.request, engine=replace(engine, experts=experts))
    return Change("experts on disk", f"{flags} {stage.flags}".strip(), tiered)


def _smaller_models(request: PlanRequest, shape: ModelShape) -> Iterator[Change]:
    """The request itself, then with less kv, and the same for fewer bits."""
    widths = [request.engine.model.quantize]
    if widths == ["none"] and not shape.packed:
        widths += ["int8", "int4"]
    for bits in widths:
        model = replace(request.engine.model, quantize=bits)
        other = replace(request, engine=replace(request.engine, model=model))
        flags = "" if bits == widths[0] else f"--quantize {bits}"
        yield Change(f"{bits} weights", flags, other)
        less = _with_kv_alone(other, shape)
        yield Change(less.words, f"{flags} {less.flags}".strip(), less.request)


def _with_kv_alone(request: PlanRequest, shape: ModelShape) -> Change:
    kv_bytes = traffic_kv_bytes(request, shape)
    kv = replace(request.engine.kv, kv_bytes=kv_bytes, num_blocks=None)
    less = replace(request, engine=replace(request.engine, kv=kv))
    return Change("kv for these requests alone", f"--kv-bytes {kv_bytes}", less)


def traffic_kv_bytes(request: PlanRequest, shape: ModelShape) -> int:
    """kv of the requests that run at once, in whole blocks; the last token leaves none."""
    engine, traffic = request.engine, request.traffic
    running = min(traffic.concurrency, engine.scheduler.max_running)
    blocks = running * -(-(traffic.sequence_tokens - 1) // engine.kv.block_tokens)
    return blocks * engine.kv.block_tokens * shape.kv_token_bytes
