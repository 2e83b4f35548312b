"""What all layers need to know of a step, worked out once: rotations, kv rows, masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moeserve.models.inputs import ForwardBatch, Span
from moeserve.models.kv_pool import KvPool
from moeserve.models.rope import Rope
from moeserve.models.spec import RopeSpec

#: Query rows are cut into tiles so that one tile's scores, all heads of one sequence together,
#: stay below this many numbers: it bounds the memory of the masks and of attention itself.
TILE_SCORES = 1 << 22


@dataclass(frozen=True)
class AttentionLayout:
    """What the attention of a layer must have in common with another to share its tiles."""

    num_kv_heads: int
    heads_per_kv_head: int
    window: int | None


@dataclass(frozen=True)
class Tile:
    """Query rows that are multiplied together: r rows of each of B sequences.

    rows: the B * r batch rows, sequence by sequence. num_rows: r.
    columns: how many kv columns they need. mask: [B, 1, G * r, columns] to be added to scores,
    rows in the order (query head of the kv head's group, row).
    """

    rows: slice | Tensor
    num_rows: int
    columns: int
    mask: Tensor


@dataclass(frozen=True)
class SpanGroup:
    """B sequences with equally many rows and kv columns, which are read from the pool together.

    kv_rows: [B * kv_heads * C], rows of a KvLayer. Column 0 is the null slot, then comes the
    context (or its last part, under a window), then again the null slot.
    """

    num_spans: int
    kv_rows: Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class StepContext:
    """One step, as the layers see it. Built by `build`, passed as an argument, kept by nobody."""

    step: int
    kv_write_slots: Tensor
    turns: Mapping[RopeSpec, tuple[Tensor, Tensor]]
    groups: Mapping[AttentionLayout, tuple[SpanGroup, ...]]

    @staticmethod
    def build(
        batch: ForwardBatch,
        kv: KvPool,
        ropes: Mapping[RopeSpec, Rope],
        layouts: Iterable[AttentionLayout],
        dtype: torch.dtype,
    ) -> StepContext:
        return StepContext(
            step=batch.step,
            kv_write_slots=batch.kv_write_slots,
            turns={spec: rope.turns(batch.positions) for spec, rope in ropes.items()},
            groups={
                layout: tuple(
                    _group(spans, columns, layout, kv.null_slot, dtype)
                    for columns, spans in _alike(batch.spans, layout)
                )
                for layout in layouts
            },
        )


def _visible_tokens(span: Span, window: int | None) -> int:
    """How many of the last tokens of its context the rows of a span can see."""
    if window is None:
        return span.context_tokens
    return min(span.context_tokens, window + span.num_rows - 1)


def _columns_for(num_tokens: int) -> int:
    """kv columns for that many tokens: one for the null slot, rounded up to few distinct sizes.

    Depends on nothing but the number, so that a sequence is computed alike whatever runs beside
    it. At most an eighth of the columns is empty from 128 up.
    """
    columns = num_tokens + 1
    step = max(16, 1 << max(0, columns.bit_length() - 4))
    return -(-columns // step) * step


def _alike(spans: Iterable[Span], layout: AttentionLayout) -> Iterable[tuple[int, list[Span]]]:
    """The spans by equal number of columns and rows: (columns, spans)."""
    alike: dict[tuple[int, int], list[Span]] = {}
    for span in spans:
        columns = _columns_for(_visible_tokens(span, layout.window))
        alike.setdefault((columns, span.num_rows), []).append(span)
    return [(columns, group) for (columns, _), group in alike.items()]


def _group(
    spans: list[Span], columns: int, layout: AttentionLayout, null_slot: int, dtype: torch.dtype
) -> SpanGroup:
    device = spans[0].kv_slots.device
    visible = [_visible_tokens(span, layout.window) for span in spans]
    slots = torch.full((len(spans), columns), null_slot, dtype=torch.int64, device=device)
    for line, span, count in zip(slots, spans, visible, strict=True):
        line[1 : count + 1] = span.kv_slots[span.context_tokens - count :]
    heads = torch.arange(layout.num_kv_heads, device=device)
    kv_rows = slots[:, None, :] * layout.num_kv_heads + heads[:, None]  # [B, kv_heads, C]
    visible_tokens = torch.tensor(visible, device=device)
    num_rows = spans[0].num_rows
    num_heads = layout.num_kv_heads * layout.heads_per_kv_head
    tile_rows = max(1, TILE_SCORES // (num_heads * columns))
    tiles = []
    for start in range(0, num_rows, tile_rows):
        stop = min(start + tile_rows, num_rows)
        needed = min(columns, _columns_for(max(visible) - num_rows + stop))
        mask = _mask(visible_tokens, num_rows, start, stop, needed, layout.window, dtype)
        mask = mask[:, None].expand(-1, layout.heads_per_kv_head, -1, -1).flatten(1, 2)
        tiles.append(Tile(_rows(spans, start, stop), stop - start, needed, mask[:, None]))
    return SpanGroup(len(spans), kv_rows.flatten(), tuple(tiles))


def _mask(
    visible_tokens: Tensor,
    num_rows: int,
    start: int,
    stop: int,
    columns: int,
    window: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """[B, stop - start, columns]: 0 where the row sees the column, else -inf.

    Column c holds token c - 1 of the visible ones, row t is token visible - num_rows + t.
    """
    device = visible_tokens.device
    row = torch.arange(start, stop, device=device)[:, None] - num_rows  # [rows, 1]
    token = torch.arange(-1, columns - 1, device=device)  # [columns]
    distance = visible_tokens[:, None, None] + row - token  # [B, rows, columns]
    hidden = (distance < 0) | (token < 0)
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def _rows(spans: list[Span], start: int, stop: int) -> slice | Tensor:
    """Batch rows start..stop of every span; a slice, which copies nothing, where they adjoin."""
    ranges = [range(span.start + start, span.start + stop) for span in spans]
    if all(before.stop == after.start for before, after in pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    rows = [row for each in ranges for row in each]
    return torch.tensor(rows, device=spans[0].kv_slots.device)
