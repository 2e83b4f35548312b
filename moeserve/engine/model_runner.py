"""Runs a scheduled batch through the model: block tables in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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
        every = rows == list(range(len(self.hidden)))  # as in a step of decodes
        return self.model.logits(self.hidden if every else self.hidden[rows])

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
        self._offsets = np.arange(block_tokens)

    def forward(self, batch: ScheduledBatch) -> StepOutput:
        with torch.inference_mode():
            return StepOutput(self.model.forward(self._inputs(batch), self.kv), self.model)

    def _inputs(self, batch: ScheduledBatch) -> ForwardBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        write_slots: list[NDArray[np.int64]] = []
        spans: list[Span] = []
        for chunk, start, end in chunk_rows(batch):
            context_tokens = chunk.stop
            slots = self._slots(chunk.block_ids, context_tokens)
            token_ids += chunk.sequence.token_ids[chunk.start : context_tokens]
            positions += range(chunk.start, context_tokens)
            write_slots.append(slots[chunk.start :])
            kv_slots = torch.from_numpy(slots).to(self.device)
            spans.append(Span(start, end, context_tokens, kv_slots, chunk.sequence.num_tokens))
        return ForwardBatch(
            token_ids=torch.tensor(token_ids, device=self.device),
            positions=torch.tensor(positions, device=self.device),
            kv_write_slots=torch.from_numpy(np.concatenate(write_slots)).to(self.device),
            spans=tuple(spans),
            step=batch.step,
        )

    def _slots(self, block_ids: tuple[int, ...], num_tokens: int) -> NDArray[np.int64]:
        """Flat kv slots of the first num_tokens of a sequence: [num_tokens]. With numpy: five
        operators of torch for every sequence of a step are a tenth of a millisecond."""
        first = np.array(block_ids, np.int64)[:, None] * self.block_tokens
        slots: NDArray[np.int64] = (first + self._offsets).ravel()[:num_tokens]
        return slots
