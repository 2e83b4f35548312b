"""What the engine's process takes, part by part, from the sizes of weights, kv and buffers.

Weights and kv are exact: they are sized by the code that allocates them. What the engine computes
in: workspace.py. Python with its libraries is what calibration has seen of a real engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moeserve.cache.expert_cache import Tier
from moeserve.planner.plan_types import MemoryPart, MemoryPlan
from moeserve.planner.shapes import ModelShape
from moeserve.planner.workspace import (
    HUGE_PAGE_BYTES,
    Steps,
    choices_bytes,
    kernel_bytes,
    latent_bytes,
    tensor_bytes,
)

#: of a row that is drawn from, besides its logits: masses in float64, with two copies
DRAWING_BYTES = 3 * 8


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the memory of a deployment depends on besides the model's sizes.

    base_bytes: of a process with all libraries and no model. num_kv_blocks, block_tokens: of the
    pool. used_blocks: by the traffic that is planned for. host_slots, device_slots: None for all
    experts resident, and for no device. max_rows: tokens of the largest step. sampled_rows: that
    choose a token in one step. huge_pages: whether packed weights lie in such. isa:
    of the kernels. shared_bytes: that kv and expert slots divide between them; None: the pool has
    memory of its own.
    """

    base_bytes: int
    num_kv_blocks: int
    used_blocks: int
    block_tokens: int
    host_slots: int | None
    device_slots: int | None
    max_rows: int
    sampled_rows: int
    num_threads: int
    huge_pages: bool
    isa: str
    shared_bytes: int | None = None


def memory_plan(shape: ModelShape, room: Room, limits: dict[Tier, int]) -> MemoryPlan:
    """limits: bytes of each tier that there is."""
    on_device = room.device_slots is not None
    home = Tier.DEVICE if on_device else Tier.HOST
    parts = [MemoryPart("interpreter and libraries", Tier.HOST, room.base_bytes, exact=False)]
    parts += _weight_parts(shape, room, home)
    block_bytes = shape.kv_token_bytes * room.block_tokens
    used_bytes = min(room.used_blocks, room.num_kv_blocks) * block_bytes
    parts.append(MemoryPart("kv of the requests", home, used_bytes))
    for name, num_bytes in _computing(shape, room):
        parts.append(MemoryPart(name, home, num_bytes, exact=False))
    rest = room.num_kv_blocks * block_bytes - used_bytes
    if room.shared_bytes is not None:  # what of it experts hold, kv takes from them
        slots_bytes = (room.host_slots or 0) * slot_bytes(shape)
        rest = min(rest, room.shared_bytes - slots_bytes - used_bytes)
    parts.append(MemoryPart("kv pool beyond them", home, rest, peak_only=True))
    drawn = room.sampled_rows * shape.vocab_size * DRAWING_BYTES
    parts.append(MemoryPart("drawing of tokens", home, drawn, exact=False, peak_only=True))
    return MemoryPlan(tuple(part for part in parts if part.num_bytes), limits)


def computing_bytes(shape: ModelShape, room: Room) -> int:
    """What the engine computes in, all of it."""
    return sum(num_bytes for _, num_bytes in _computing(shape, room))


def _computing(shape: ModelShape, room: Room) -> Iterator[tuple[str, int]]:
    steps = Steps(
        rows=room.max_rows,
        sampled=room.sampled_rows,
        in_parts=room.host_slots is not None or room.device_slots is not None,
        num_threads=room.num_threads,
        isa=room.isa,
    )
    yield "buffers of the kernels", kernel_bytes(shape, steps)
    yield "choices of tokens", choices_bytes(shape, steps)
    yield "tensors of a step", tensor_bytes(shape, steps)
    yield "latent attention", latent_bytes(shape, steps)


def _weight_parts(shape: ModelShape, room: Room, home: Tier) -> Iterator[MemoryPart]:
    yield MemoryPart("weights of every token", home, shape.rest_bytes)
    record = slot_bytes(shape)
    if room.device_slots is not None:
        yield MemoryPart("expert slots on the device", Tier.DEVICE, room.device_slots * record)
    if room.host_slots is not None:
        yield MemoryPart("expert slots", Tier.HOST, room.host_slots * record)
        yield MemoryPart("experts", Tier.DISK, shape.expert_bytes)
    else:
        pinned = ", pinned" if room.device_slots is not None else ""
        yield MemoryPart(f"experts{pinned}", Tier.HOST, shape.expert_bytes)
    mapped = shape.packed and room.host_slots is None
    if room.huge_pages and shape.native and not mapped:
        # also where they stand for a device's, as emulated; a real one has no such pages
        yield MemoryPart("rounding to huge pages", Tier.HOST, rounding_bytes(_matrices(shape)))
        if room.host_slots is None:
            experts = rounding_bytes(_experts_of_layers(shape))
            yield MemoryPart("rounding of experts", Tier.HOST, experts)


def slot_bytes(shape: ModelShape) -> int:
    """Of one slot: the largest record of any layer; 0 without experts."""
    return max((s.experts.record_bytes for s in shape.layers if s.experts), default=0)


def rounding_bytes(sizes: Iterable[int]) -> int:
    """Beyond blocks of such sizes, each of which starts on a huge page of its own."""
    return sum(-size % HUGE_PAGE_BYTES for size in sizes)


def _matrices(shape: ModelShape) -> Iterator[int]:
    """Bytes of each packed matrix that every token takes."""
    yield shape.head.num_bytes
    for layer in shape.layers:
        yield from (matrix.num_bytes for matrix in layer.products if matrix.packed)


def _experts_of_layers(shape: ModelShape) -> Iterator[int]:
    """Bytes of all experts of each layer."""
    for layer in shape.layers:
        if layer.experts is not None:
            yield layer.experts.record_bytes * layer.experts.spec.num_experts
