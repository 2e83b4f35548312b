"""What one step computes and what came out of it: the contract of scheduler and model runner."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeserve.core import TokenLogprob
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.sequence import Sequence


@dataclass(frozen=True)
class ScheduledChunk:
    """Consecutive tokens of one sequence to compute in this step.

    sequence: to be read only; `sequence.token_ids[start:stop]` are the tokens to feed.
    start: position of the first of them; the kv of all positions before is in the blocks.
    num_tokens: 1 in decode, more in prefill.
    block_ids: the blocks of positions `[0, stop)`; valid until the step is committed.
    samples: the logits of the last token choose a token (False: more prompt follows, or the
        request only wants its prompt scored).
    scored: prompt positions whose tokens this chunk must score, empty when not asked for; the
        logits at position p - 1 score the token at position p. Those scored before a preemption
        are left out.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    block_ids: tuple[int, ...]
    samples: bool
    scored: range = range(0)

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @classmethod
    def of(cls, sequence: Sequence, budget: int, blocks: BlockManager) -> ScheduledChunk:
        """The next tokens of a running sequence, at most `budget`."""
        num_tokens = min(budget, sequence.num_tokens_to_compute)
        stop = sequence.num_computed_tokens + num_tokens
        return cls(
            sequence=sequence,
            start=sequence.num_computed_tokens,
            num_tokens=num_tokens,
            block_ids=tuple(sequence.block_ids[: blocks.blocks_for(stop)]),
            samples=stop == sequence.num_tokens and sequence.request.params.max_tokens > 0,
            scored=sequence.positions_to_score(stop),
        )


@dataclass(frozen=True)
class ScheduledBatch:
    """The chunks of one step: decodes first, at most one chunk per sequence."""

    chunks: tuple[ScheduledChunk, ...]
    step: int

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True)
class SampledToken:
    """logprob: given exactly when the request asked for logprobs."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class StepResult:
    """What the runner and the sampler made of a batch.

    tokens: by request id, one for every chunk with `samples`.
    prompt_logprobs: by request id, one per position in `chunk.scored`, in that order; a request
        with nothing scored in this step may be missing.
    """

    tokens: dict[str, SampledToken]
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
