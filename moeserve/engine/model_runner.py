"""Runs a scheduled batch through the model: block tables in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.engine.batch import ScheduledBatch, ScheduledChunk
from moeserve.engine.sampler import score_slices
from moeserve.models.inputs import ForwardBatch, Span
from moeserve.models.kv_pool import KvPool
from moeserve.models.transformer import Transformer


@dataclass(frozen=True)
class StepOutput:
    """What one forward pass gives. Logits are made on demand: most prompt rows need none.

    hidden: [T, H], rows in the order of the batch's chunks.
    """

    hidden: Tensor
    model: Transformer

    def next_token_logits(self, batch: ScheduledBatch) -> Tensor:
        """[R, V] float32 for the R chunks that choose a token, in their order."""
        rows = [end - 1 for chunk, _, end in chunk_rows(batch) if chunk.samples]
        return self.model.logits(self.hidden[rows])

    def prompt_logits(self, start: int, num_rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Logits of `num_rows` rows from `start`, in slices small enough to hold."""
        for rows in score_slices(num_rows):
            yield rows, self.model.logits(self.hidden[start + rows.start : start + rows.stop])


def chunk_rows(batch: ScheduledBatch) -> Iterator[tuple[ScheduledChunk, int, int]]:
    """Each chunk with the rows [start, end) it has in the batch."""
    start = 0
    for chunk in batch.chunks:
        yield chunk, start, start + chunk.num_tokens
        start += chunk.num_tokens


class ModelRunner:
    """Owns the kv pool's memory; the block manager says what lies where in it."""

    def __init__(self, model: Transformer, kv: KvPool, block_tokens: int, device: torch.device):
        self.model = model
        self.kv = kv
        self.block_tokens = block_tokens
        self.device = device
        self._offsets = torch.arange(block_tokens)

    def forward(self, batch: ScheduledBatch) -> StepOutput:
        with torch.inference_mode():
            return StepOutput(self.model.forward(self._inputs(batch), self.kv), self.model)

    def _inputs(self, batch: ScheduledBatch) -> ForwardBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        write_slots: list[Tensor] = []
        spans: list[Span] = []
        for chunk, start, end in chunk_rows(batch):
            context_tokens = chunk.start + chunk.num_tokens
            slots = self._slots(chunk.block_ids, context_tokens)
            token_ids += chunk.sequence.token_ids[chunk.start : context_tokens]
            positions += range(chunk.start, context_tokens)
            write_slots.append(slots[chunk.start :])
            slots = slots.to(self.device)
            spans.append(Span(start, end, context_tokens, slots, chunk.sequence.num_tokens))
        return ForwardBatch(
            token_ids=torch.tensor(token_ids, device=self.device),
            positions=torch.tensor(positions, device=self.device),
            kv_write_slots=torch.cat(write_slots).to(self.device),
            spans=tuple(spans),
            step=batch.step,
        )

    def _slots(self, block_ids: tuple[int, ...], num_tokens: int) -> Tensor:
        """Flat kv slots of the first num_tokens of a sequence: [num_tokens] int64."""
        first = torch.tensor(block_ids, dtype=torch.int64) * self.block_tokens
        return (first[:, None] + self._offsets).flatten()[:num_tokens]
