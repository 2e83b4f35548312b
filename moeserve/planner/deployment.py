"""From a request to a deployment: everything checked, everything sized, nothing loaded."""

from __future__ import annotations

from dataclasses import replace

from moeserve.cache.expert_cache import Tier
from moeserve.config import EngineConfig
from moeserve.core import ConfigError
from moeserve.engine.kv_limit import num_kv_blocks
from moeserve.experts.schedule.profile import Profile
from moeserve.experts.schedule.profile_file import profile_names
from moeserve.planner.memory import Room, computing_bytes, memory_plan, slot_bytes
from moeserve.planner.plan_types import Deployment, PlanRequest, Traffic
from moeserve.planner.shapes import ModelShape

#: of a process without a model where nobody measured it: as on our own test machine
ASSUMED_PROCESS_BYTES = 257 << 20


def sized(request: PlanRequest, profile: Profile, shape: ModelShape) -> Deployment:
    """Whether it fits or not. Raises ConfigError for what contradicts itself or the model."""
    check_traffic(request.traffic, shape)
    engine = request.engine
    num_blocks = kv_blocks_of(engine, shape)
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
    budget = engine.experts.host_memory_bytes
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
        isa=profile.hardware.isa,
        shared_bytes=None if budget is None else budget - shape.rest_bytes,
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


def kv_blocks_of(engine: EngineConfig, shape: ModelShape) -> int:
    """Of the pool that these settings give. Raises ConfigError for less than one."""
    block_bytes = shape.kv_token_bytes * engine.kv.block_tokens
    return num_kv_blocks(
        engine, block_bytes, shape.rest_bytes, slot_bytes(shape), shape.context_tokens
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
    if not shape.native or shape.dtype == "float16":
        raise ConfigError(
            f"host_memory: experts on disk are packed for the native CPU backend, and those of"
            f" {shape.name} in {shape.dtype} on {engine.model.device} cannot be",
            field="host_memory_bytes",
            hint="plan for --device cpu or emulated, with --dtype bfloat16 or float32",
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
        if not shape.num_experts:
            raise ConfigError(
                f"device_slots: {shape.name} has no experts that could stand in slots",
                field="device_slots",
                hint="leave it out",
            )
        return min(engine.experts.device_slots, shape.num_experts)
    kv_bytes = room.num_kv_blocks * room.block_tokens * shape.kv_token_bytes
    computing = computing_bytes(shape, replace(room, device_slots=0))
    left = limit - shape.rest_bytes - kv_bytes - 2 * computing
    wanted = engine.experts.device_memory_bytes
    room_bytes = left if wanted is None else min(left, wanted)
    record = slot_bytes(shape)
    return max(0, min(room_bytes // record, shape.num_experts)) if record else 0


def traffic_blocks(request: PlanRequest) -> int:
    """kv blocks of the requests that run at once; the last token leaves no kv. At least those of
    the longest request."""
    engine, traffic = request.engine, request.traffic
    running = min(traffic.concurrency, engine.scheduler.max_running)
    blocks = running * -(-(traffic.sequence_tokens - 1) // engine.kv.block_tokens)
    return max(blocks, -(-request.longest_tokens // engine.kv.block_tokens))


def traffic_kv_bytes(request: PlanRequest, shape: ModelShape) -> int:
    """The same in bytes."""
    return traffic_blocks(request) * request.engine.kv.block_tokens * shape.kv_token_bytes
