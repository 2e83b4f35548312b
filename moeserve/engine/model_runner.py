"""Runs a scheduled batch through the model: block tables in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
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
        every = len(rows) == self.hidden.shape[0]  # as in a step of decodes
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
        self._slots = np.arange(kv.null_slot).reshape(-1, block_tokens)  # of every block

    def forward(self, batch: ScheduledBatch) -> StepOutput:
        with torch.inference_mode():
            return StepOutput(self.model.forward(self._inputs(batch), self.kv), self.model)

    def _inputs(self, batch: ScheduledBatch) -> ForwardBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []  # of the rows' slots among those of all blocks
        block_ids: list[int] = []
        firsts: list[int] = []
        for chunk, _, _ in chunk_rows(batch):
            first = len(block_ids) * self.block_tokens
            token_ids += chunk.sequence.token_ids[chunk.start : chunk.stop]
            positions += range(chunk.start, chunk.stop)
            places += range(first + chunk.start, first + chunk.stop)
            block_ids += chunk.block_ids
            firsts.append(first)
        # As few operators as can be, whatever the number of sequences, and numpy's: a decode step
        # leaves caches cold, where each costs more than what it does.
        slots = self._slots[block_ids].ravel()
        rows = np.array([token_ids, positions, places], np.int64)  # [3, T]
        rows[2] = slots[rows[2]]
        tokens, at, write_slots = torch.from_numpy(rows).to(self.device).unbind()
        kv_slots = torch.from_numpy(slots).to(self.device)
        spans: list[Span] = []
        for (chunk, start, end), first in zip(chunk_rows(batch), firsts, strict=True):
            own = kv_slots[first : first + chunk.stop]
            spans.append(Span(start, end, chunk.stop, own, chunk.sequence.num_tokens))
        return ForwardBatch(tokens, at, write_slots, tuple(spans), batch.step)
