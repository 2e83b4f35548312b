"""What all layers need to know of a step, worked out once: rotations, kv slots, masks.

A row's result must not depend, to the bit, on what else is in the batch or on how its prompt was
cut into chunks. torch's fused attention on the CPU keeps that promise where a token always stands
at the same place of a vector and of a block of columns, longer contexts come in whole blocks of
columns, and query rows in whole STEP_ROWS; otherwise MKL takes other kernels, or cuts the columns
in two, and adds in another order. So a token's column follows from its position alone. Measured on
processors of Intel and AMD, not documented: tests/models/test_same_bits.py tries it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeserve.models.inputs import ForwardBatch, Span
from moeserve.models.kv_pool import KvPool
from moeserve.models.rope import Rope
from moeserve.models.spec import RopeSpec

if TYPE_CHECKING:
    from moeserve.models.attention_plan import AttentionPlan, Planner

#: kv columns that fused attention takes at a time (torch's CPU kernel: kvSplitSize)
BLOCK_COLUMNS = 512
#: contexts of more columns are padded to whole blocks: on AMD's processors MKL cuts 224 and 256 of
#: them in two, and adds up the halves
SHORT_COLUMNS = 192
#: no vector register holds more numbers, and GPU kernels want multiples of 8 or 16
ALIGNED_COLUMNS = 32
#: query rows are padded to a multiple of it
STEP_ROWS = 8
#: Rows of a sequence are computed in tiles of at most that many, each with the context it sees.
MAX_TILE_ROWS = 64
#: Bounds on the numbers in a tile's scores and in the kv that is gathered for it. The C library
#: takes blocks above 32 MiB afresh from the system every time, which costs more than to fill them.
TILE_SCORES = 1 << 22
TILE_KV = 1 << 22


@dataclass(frozen=True)
class AttentionLayout:
    """What the attention of a layer must have in common with another to share its tiles."""

    num_kv_heads: int
    heads_per_kv_head: int
    kv_width: int
    window: int | None


@dataclass(frozen=True)
class AttentionTile:
    """r query rows of each of B sequences, with equally many kv columns: one fused product.

    rows: the B * r batch rows, sequence by sequence. kv_slots: [B * C], C for each sequence: the
    null slot, then the context, then again the null slot.
    mask: [B, 1, M, C] to be added to scores, rows in the order (query head of the kv head, row);
    M is G * r and padding up to a multiple of STEP_ROWS.
    """

    num_spans: int
    num_rows: int
    rows: slice | Tensor
    kv_slots: Tensor
    mask: Tensor


@dataclass(frozen=True)
class StepContext:
    """One step, as the layers see it. Built by `build`, passed as an argument, kept by nobody."""

    step: int
    kv_write_slots: Tensor
    turns: Mapping[RopeSpec, tuple[Tensor, Tensor]]
    attention: AttentionPlan

    @staticmethod
    def build(
        batch: ForwardBatch,
        kv: KvPool,
        ropes: Mapping[RopeSpec, Rope],
        layouts: Collection[AttentionLayout],
        planner: Planner,
        dtype: torch.dtype,
    ) -> StepContext:
        return StepContext(
            step=batch.step,
            kv_write_slots=batch.kv_write_slots,
            turns={spec: rope.turns(batch) for spec, rope in ropes.items()},
            attention=planner(batch, kv, layouts, dtype),
        )


@dataclass(frozen=True)
class _Piece:
    """Rows of one span that go into one tile, and the tokens they see."""

    first_row: int  # in the batch
    num_rows: int
    first_token: int
    end_token: int  # one beyond the last row's own
    kv_slots: Tensor  # of the span

    @property
    def num_columns(self) -> int:
        """One for the null slot and one per token, rounded up to few distinct numbers."""
        columns = self.end_token - self.first_token + 1
        step = BLOCK_COLUMNS if columns > SHORT_COLUMNS else ALIGNED_COLUMNS
        return -(-columns // step) * step


def attention_tiles(
    spans: Iterable[Span], layout: AttentionLayout, null_slot: int, dtype: torch.dtype
) -> tuple[AttentionTile, ...]:
    """The tiles that together compute all rows of the spans."""
    alike: dict[tuple[int, int], list[_Piece]] = {}
    for span in spans:
        for piece in _pieces(span, layout):
            alike.setdefault((piece.num_columns, piece.num_rows), []).append(piece)
    tiles: list[AttentionTile] = []
    for (columns, _), pieces in alike.items():
        together = max(1, TILE_KV // (columns * layout.num_kv_heads * layout.kv_width))
        tiles += [
            _tile(pieces[start : start + together], columns, layout, null_slot, dtype)
            for start in range(0, len(pieces), together)
        ]
    return tuple(tiles)


def _pieces(span: Span, layout: AttentionLayout) -> Iterator[_Piece]:
    tile_rows = TILE_SCORES // (layout.heads_per_kv_head * (span.context_tokens + 1))
    tile_rows = max(1, min(tile_rows, MAX_TILE_ROWS))
    window = layout.window
    for start in range(0, span.num_rows, tile_rows):
        stop = min(start + tile_rows, span.num_rows)
        end_token = span.context_tokens - span.num_rows + stop
        first_token = 0
        if window is not None:
            # Where a window and a tile are short, only a token's place in a vector counts.
            fits = window + MAX_TILE_ROWS + ALIGNED_COLUMNS <= SHORT_COLUMNS
            step = ALIGNED_COLUMNS if fits else BLOCK_COLUMNS
            oldest = max(0, end_token - (stop - start) - window + 1)
            first_token = oldest // step * step
        yield _Piece(span.start + start, stop - start, first_token, end_token, span.kv_slots)


def _tile(
    pieces: list[_Piece],
    columns: int,
    layout: AttentionLayout,
    null_slot: int,
    dtype: torch.dtype,
) -> AttentionTile:
    device = pieces[0].kv_slots.device
    slots = torch.full((len(pieces), columns), null_slot, dtype=torch.int64, device=device)
    for line, piece in zip(slots, pieces, strict=True):
        seen = piece.kv_slots[piece.first_token : piece.end_token]
        line[1 : len(seen) + 1] = seen
    return AttentionTile(
        num_spans=len(pieces),
        num_rows=pieces[0].num_rows,
        rows=_rows(pieces),
        kv_slots=slots.flatten(),
        mask=_mask(pieces, columns, layout, dtype, device),
    )


def _mask(
    pieces: list[_Piece],
    columns: int,
    layout: AttentionLayout,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """[B, 1, M, C]: 0 where the row sees the column, else -inf.

    Column c holds token first_token + c - 1; row t of r is token end_token - r + t.
    """
    num_rows = pieces[0].num_rows
    end = torch.tensor([piece.end_token - piece.first_token for piece in pieces], device=device)
    row = torch.arange(-num_rows, 0, device=device)[:, None]  # [r, 1]
    token = torch.arange(-1, columns - 1, device=device)  # [C]
    distance = end[:, None, None] + row - token  # [B, r, C]
    hidden = (distance < 0) | (token < 0)
    if layout.window is not None:
        hidden |= distance >= layout.window
    group = layout.heads_per_kv_head
    padded = -(-group * num_rows // STEP_ROWS) * STEP_ROWS
    mask = torch.zeros(len(pieces), 1, padded, columns, dtype=dtype, device=device)
    real = mask[:, 0, : group * num_rows].unflatten(1, (group, num_rows))
    real.masked_fill_(hidden[:, None], -torch.inf)
    return mask


def _rows(pieces: list[_Piece]) -> slice | Tensor:
    """Batch rows of every piece; a slice, which copies nothing, where they adjoin."""
    ranges = [range(piece.first_row, piece.first_row + piece.num_rows) for piece in pieces]
    if all(before.stop == after.start for before, after in pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    rows = [row for each in ranges for row in each]
    return torch.tensor(rows, device=pieces[0].kv_slots.device)
