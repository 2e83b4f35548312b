"""A model that needs no weights: the next token is a function of the whole prefix.

It keeps its own kv: per block slot the token that was written there. Reading a context back through
the block table must give exactly the sequence's tokens, so a block that was reused wrongly, shared
while written, or overwritten too early shows at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from moeserve.core import EngineRequest, SamplingParams, TokenLogprob
from moeserve.engine.batch import SampledToken, ScheduledBatch, StepResult
from moeserve.engine.sequence import Sequence

VOCAB = 5  # small, so that prefixes of different requests meet by chance
EOS = 0


def next_token(prefix: Seq[int]) -> int:
    """Any of the vocabulary, end-of-sequence in about one of eleven cases."""
    digest = zlib.crc32(repr(list(prefix)).encode())
    return EOS if digest % 11 == 0 else 1 + digest // 11 % (VOCAB - 1)


def expected_output(request: EngineRequest) -> list[int]:
    """What an undisturbed run gives."""
    tokens = list(request.token_ids)
    for _ in range(request.params.max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not request.params.ignore_eos:
            break
    return tokens[len(request.token_ids) :]


def score(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=-1.0, rank=1, top=[])


def request(name: str, token_ids: Seq[int], max_tokens: int = 8, **more: object) -> EngineRequest:
    names = ("priority", "deadline_s")
    own = {key: more.pop(key) for key in names if key in more}
    params = SamplingParams(max_tokens=max_tokens, **more)  # type: ignore[arg-type]
    return EngineRequest(request_id=name, token_ids=list(token_ids), params=params, **own)  # type: ignore[arg-type]


@dataclass
class ChunkRoom:
    """Gives memory in chunks, for idle blocks to stay in or not."""

    extent: int
    limit: int
    chunk: int
    keeps_idle: bool

    def grow(self, needed: int, preferred: int) -> None:
        assert needed <= preferred <= self.limit
        chunks = -(-(preferred if self.keeps_idle else needed) // self.chunk)
        self.extent = max(self.extent, min(self.limit, chunks * self.chunk))


class FakeModel:
    """Runs batches like a model runner would: all writes of a step first, then all reads.

    Kv is the token, and whether its sequence was longer than kv_switch_tokens.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, kv_switch_tokens: int | None = None
    ) -> None:
        self.block_tokens = block_tokens
        self.slots: list[tuple[int, bool] | None] = [None] * (num_blocks * block_tokens)
        self.kv_switch_tokens = kv_switch_tokens

    def _kv(self, sequence: Sequence, stop: int) -> list[tuple[int, bool]]:
        """What the first `stop` tokens must have left."""
        switch = self.kv_switch_tokens
        is_long = switch is not None and sequence.num_tokens > switch
        return [(token_id, is_long) for token_id in sequence.token_ids[:stop]]

    def _slot(self, block_ids: Seq[int], position: int) -> int:
        return block_ids[position // self.block_tokens] * self.block_tokens + (
            position % self.block_tokens
        )

    def run(self, batch: ScheduledBatch) -> StepResult:
        written: set[int] = set()
        for chunk in batch.chunks:
            for position in range(chunk.start, chunk.stop):
                slot = self._slot(chunk.block_ids, position)
                assert slot not in written, "two chunks write one slot"
                written.add(slot)
                self.slots[slot] = self._kv(chunk.sequence, chunk.stop)[position]
        tokens, scores = {}, {}
        for chunk in batch.chunks:
            context = [self.slots[self._slot(chunk.block_ids, p)] for p in range(chunk.stop)]
            assert context == self._kv(chunk.sequence, chunk.stop), "kv of another prefix"
            request = chunk.sequence.request
            if chunk.samples:
                token_id = next_token(chunk.sequence.token_ids[: chunk.stop])
                logprob = None if request.params.logprobs is None else score(token_id)
                tokens[request.request_id] = SampledToken(token_id, logprob)
            if chunk.scored:
                assert chunk.start < chunk.scored[0] <= chunk.scored[-1] <= chunk.stop
                targets = [request.token_ids[position] for position in chunk.scored]
                scores[request.request_id] = [score(token) for token in targets]
        return StepResult(tokens, scores)

    def shrink(self, moves: Seq[tuple[int, int]], extent: int) -> None:
        """Moves blocks (from, to), and loses what lies beyond the extent."""
        size = self.block_tokens
        for source, target in moves:
            self.slots[target * size : (target + 1) * size] = self.slots[
                source * size : (source + 1) * size
            ]
        self.slots[extent * size :] = [None] * (len(self.slots) - extent * size)
