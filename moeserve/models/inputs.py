"""What one step of the model works on: rows of many sequences, and where their kv lies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The rows of one sequence in a batch: consecutive tokens, the last of its context so far.

    kv_slots: [context_tokens] int64, the kv slot of every token up to and including these rows.
    sequence_tokens: tokens that the sequence has by now, prompt and output, of which a chunk of a
    prompt is a part; rotary embeddings that depend on a sequence's length want it.
    """

    start: int
    stop: int
    context_tokens: int
    kv_slots: Tensor
    sequence_tokens: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of one step. The spans cover the rows 0..T in order, without gaps.

    token_ids, positions, kv_write_slots: [T] int64 on the model's device. A token's kv goes to its
    write slot, which is also the entry of its span's kv_slots.
    """

    token_ids: Tensor
    positions: Tensor
    kv_write_slots: Tensor
    spans: tuple[Span, ...]
    step: int
