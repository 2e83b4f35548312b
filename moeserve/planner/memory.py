"""What the engine's process takes, part by part, from the sizes of weights, kv and buffers.

Weights and kv are exact: they are sized by the code that allocates them. The workspace follows the
native kernels' buffers (cpu_backend/csrc/moe.cpp, expert_list.cpp, decoder.cpp, linear.cpp), which
grow to the largest step and stay. Python with its libraries is what calibration has seen of a real
engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moeserve.cache.expert_cache import Tier
from moeserve.planner.plan_types import LayerShape, MemoryPart, MemoryPlan, ModelShape

HUGE_PAGE_BYTES = 2 << 20
#: of a row that the sampler draws from: logits, and their masses in float64 with two copies
SAMPLING_BYTES = 4 + 3 * 8
#: outputs of a panel, and what a thread has at once where rows are many: rows and panels of a
#: linear layer (linear.cpp); panels of gate and up (expert_list.cpp) and of down (moe.cpp)
PANEL_OUTPUTS, LINEAR_ROWS, LINEAR_PANELS, GATE_UP_PANELS, DOWN_PANELS = 16, 128, 12, 24, 18
#: experts per thread from which on a thread computes all of one's gate and up; rows that are many
EXPERTS_PER_THREAD, MANY_ROWS = 4, 8
#: of all rows, those that one routed expert has at most, in practice
EXPERT_SHARE = 0.25
#: products of an FFN that every row takes, by their names in a shape: dense ones, shared experts
EVERY_ROW = ("ffn", "shared")


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the memory of a deployment depends on besides the model's sizes.

    base_bytes: of a process with all libraries and no model. num_kv_blocks, block_tokens: of the
    pool. used_blocks: by the traffic that is planned for. host_slots, device_slots: None for all
    experts resident, and for no device. max_rows: tokens of the largest step. sampled_rows: that
    choose a token in one step. huge_pages: whether packed weights lie in such.
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


def memory_plan(shape: ModelShape, room: Room, limits: dict[Tier, int]) -> MemoryPlan:
    """limits: bytes of each tier that there is."""
    on_device = room.device_slots is not None
    home = Tier.DEVICE if on_device else Tier.HOST
    parts = [MemoryPart("interpreter and libraries", Tier.HOST, room.base_bytes, exact=False)]
    parts += _weight_parts(shape, room, home)
    block_bytes = shape.kv_token_bytes * room.block_tokens
    used_bytes = min(room.used_blocks, room.num_kv_blocks) * block_bytes
    parts.append(MemoryPart("kv of the requests", home, used_bytes))
    workspace = workspace_bytes(shape, room)
    parts.append(MemoryPart("workspace", home, workspace, exact=False))
    rest = room.num_kv_blocks * block_bytes - used_bytes
    if room.host_slots is None:  # else the pool and the experts share what there is
        parts.append(MemoryPart("kv pool beyond them", home, rest, peak_only=True))
    drawn = room.sampled_rows * shape.vocab_size * SAMPLING_BYTES
    prefill = prefill_bytes(shape, room.max_rows) + drawn
    parts.append(MemoryPart("prefill and sampling", home, prefill, exact=False, peak_only=True))
    return MemoryPlan(tuple(part for part in parts if part.num_bytes), limits)


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
    if room.huge_pages and shape.native and not mapped and home is Tier.HOST:
        resident = room.host_slots is None
        yield MemoryPart("rounding to huge pages", Tier.HOST, rounding_bytes(shape, resident))


def slot_bytes(shape: ModelShape) -> int:
    """Of one slot: the largest record of any layer; 0 without experts."""
    return max((s.experts.record_bytes for s in shape.layers if s.experts), default=0)


def rounding_bytes(shape: ModelShape, experts_resident: bool) -> int:
    """Each packed matrix, and each layer's experts, start on a huge page of their own."""
    sizes = [shape.head.num_bytes]
    for layer in shape.layers:
        sizes += [matrix.num_bytes for matrix in layer.products if matrix.packed]
        if layer.experts is not None and experts_resident:
            sizes.append(layer.experts.record_bytes * layer.experts.spec.num_experts)
    return sum(-size % HUGE_PAGE_BYTES for size in sizes)


def workspace_bytes(shape: ModelShape, room: Room) -> int:
    """Buffers that the native kernels keep, for steps of up to `max_rows` rows."""
    rows, hidden, item = room.max_rows, shape.hidden_size, shape.number_bytes
    needs = [_layer_buffers(layer, shape, rows, room.num_threads) for layer in shape.layers]
    buffers: int = sum(max(sizes) for sizes in zip(*needs, strict=True))
    per_thread = max(_thread_bytes(layer, rows, room.num_threads) for layer in shape.layers)
    parts = 0
    if room.host_slots is not None or room.device_slots is not None:
        pairs = rows * max((s.experts.top_k for s in shape.layers if s.experts), default=0)
        parts = 3 * pairs * hidden * 4  # of NativeParts: a row of every choice, and twice a part's
    return buffers + room.num_threads * per_thread + rows * hidden * item + parts


def _thread_bytes(layer: LayerShape, rows: int, num_threads: int) -> int:
    """One thread's sums, and the activations of an expert that it computes alone."""
    numbers = min(rows, LINEAR_ROWS) * LINEAR_PANELS * PANEL_OUTPUTS
    most = inner = 0
    if layer.experts is not None:
        most = round(rows * EXPERT_SHARE)
        if _computed_alone(layer, num_threads):
            inner = most * layer.experts.spec.intermediate_size
    if any(matrix.name in EVERY_ROW for matrix in layer.products):
        most = rows  # one expert that every row takes
    if most:
        panels = most * GATE_UP_PANELS + rows * DOWN_PANELS
        numbers = max(numbers, panels * PANEL_OUTPUTS + inner)
    return numbers * 4


def _computed_alone(layer: LayerShape, num_threads: int) -> bool:
    """Whether a thread computes all of an expert's gate and up. Rows in float32 are not rounded, so
    that they need no place of their own."""
    experts = layer.experts
    return (
        experts is not None
        and experts.form != "float32"
        and experts.spec.num_experts >= EXPERTS_PER_THREAD * num_threads
    )


def _layer_buffers(
    layer: LayerShape, shape: ModelShape, rows: int, num_threads: int
) -> tuple[int, ...]:
    """Bytes of each buffer that a layer needs: rows as they come in, between the products of an
    expert, before they are rounded; normed, projected and mixed rows."""
    item, hidden = shape.number_bytes, shape.hidden_size
    projected = sum(m.rows for m in layer.products if m.name in ("qkv.weight", "query.weight"))
    attention = layer.attention
    mixed = max(attention.num_heads * attention.value_width, hidden)
    pairs = inner = rounded = 0
    if layer.experts is not None:
        pairs = rows * layer.experts.top_k
        inner = layer.experts.spec.intermediate_size
        few = MANY_ROWS * layer.experts.spec.num_experts
        rounded = min(pairs, few) if _computed_alone(layer, num_threads) else pairs
    widest = max((m.rows // 3 for m in layer.products if m.name in EVERY_ROW), default=0)
    middle = pairs * inner + rows * widest  # a layer's shared expert beside its routed ones
    return (
        rows * max(hidden, mixed) * item,
        middle * item,
        (rounded * inner + rows * widest) * 4,
        rows * hidden * item,
        rows * projected * item,
        rows * mixed * item,
    )


def prefill_bytes(shape: ModelShape, rows: int) -> int:
    """Tensors that live for moments of a step: the stream, its norm, embeddings, slots."""
    return 3 * rows * shape.hidden_size * shape.number_bytes
