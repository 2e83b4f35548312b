"""Can a request ever run, and may the first that waits start now? Three rules for the latter.

A request that starts too early makes kv run out later, and somebody is preempted; one that starts
too late waits although there was room. The rules differ in how they guess the length of outputs:

- `Aggressive`: not at all; the tokens there are now must fit.
- `Conservative`: every output gets as long as its `max_tokens`. Never preempts.
- `PastFuture`: as long as recent outputs were. Gong et al., "Past-Future Scheduler for LLM Serving
  under SLA Guarantees", ASPLOS 2025.

All rules count a block that several sequences share once, and an idle block as free.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence as Seq
from typing import Final, Protocol

from moeserve.config import SchedulerConfig
from moeserve.core import EngineRequest, ErrorCode, RequestError
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.sequence import Sequence

GOLDEN_RATIO: Final = 0.6180339887498949


class AdmissionPolicy(Protocol):
    def admits(self, candidate: Sequence, running: Seq[Sequence], blocks: BlockManager) -> bool:
        """May `candidate`, whose table is matched and whose tokens fit now, start?"""
        ...

    def observe(self, num_output_tokens: int) -> None:
        """An output is complete and that long; one cut by max_tokens counts as it is."""
        ...


class Aggressive:
    """Starts whatever fits now. `reserve`: part of the pool left for growth (a watermark)."""

    def __init__(self, reserve: float = 0.0) -> None:
        self._reserve = reserve

    def admits(self, candidate: Sequence, running: Seq[Sequence], blocks: BlockManager) -> bool:
        take = blocks.num_blocks_to_take(candidate.table, candidate.num_tokens)
        return take <= blocks.num_available - int(self._reserve * blocks.num_blocks)

    def observe(self, num_output_tokens: int) -> None:
        """Learns nothing."""


class Conservative:
    """Starts what fits even if every output gets as long as its request allows."""

    def admits(self, candidate: Sequence, running: Seq[Sequence], blocks: BlockManager) -> bool:
        take = blocks.num_blocks_to_take(candidate.table, candidate.max_kv_tokens)
        growth = sum(blocks.blocks_for(s.max_kv_tokens) - len(s.block_ids) for s in running)
        return take + growth <= blocks.num_available

    def observe(self, num_output_tokens: int) -> None:
        """Learns nothing."""


class OutputLengths:
    """The last `size` output lengths, and the lengths they predict for requests still running."""

    def __init__(self, size: int) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self._size = size

    def add(self, num_tokens: int) -> None:
        if len(self._recent) == self._size:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(num_tokens)
        insort(self._sorted, num_tokens)

    def quantile(self, fraction: float, more_than: int, longest: int) -> int:
        """The given quantile (0 <= fraction < 1) of the lengths above `more_than`.

        `longest`, the request's own limit, counts as one more observation at the top: with nothing
        known above `more_than` it is the answer, and it fades as knowledge grows. So an empty
        history behaves like the conservative rule without a branch for it.
        """
        first = bisect_right(self._sorted, more_than)
        index = first + int(fraction * (len(self._sorted) - first + 1))
        return min(self._sorted[index], longest) if index < len(self._sorted) else longest


class PastFuture:
    """Starts what keeps the predicted peak of kv within the pool.

    Future. Let sequence j hold a_j blocks of its own and have r_j tokens to go, sorted so that
    r_1 >= r_2 >= ...; all decode in step. Use is highest right before some sequence i ends, when
    exactly 1..i are left and each has grown by r_i (the paper's future required memory, here in
    blocks of B tokens and with the S blocks that several sequences share, as held to the end):

        peak = S + max_i [ a_1 + ... + a_i + i * (ceil(r_i / B) + 1) ]

    The 1 is a spare block for every sequence, which pays for the error of the prediction. The
    paper reserves a part of the pool instead; but errors come from outputs, so they grow with the
    number of sequences and not with the length of prompts, and a fixed part of the pool is too
    much where prompts are long.

    Past. r_j comes from recent output lengths, given that the output is longer than it is already.
    The paper draws at random, anew on every step. But a refused request is asked about on every
    step, so redrawing sooner or later gives a draw that is too low, and that one is acted upon.
    Here sequence j keeps one quantile, u_j = frac(arrival number * golden ratio), and takes that
    quantile of its conditional distribution. The golden-ratio sequence spreads any run of
    consecutive numbers evenly over [0, 1) (three-distance theorem), so a batch of sequences stands
    for the whole distribution with less noise than independent draws, and reproducibly.
    """

    def __init__(self, history_requests: int) -> None:
        self._lengths = OutputLengths(history_requests)

    def observe(self, num_output_tokens: int) -> None:
        self._lengths.add(num_output_tokens)

    def admits(self, candidate: Sequence, running: Seq[Sequence], blocks: BlockManager) -> bool:
        return self.peak_blocks(candidate, running, blocks) <= blocks.num_blocks

    def peak_blocks(self, candidate: Sequence, running: Seq[Sequence], blocks: BlockManager) -> int:
        """Predicted peak use of the pool if `candidate` starts now."""
        tables = [sequence.table for sequence in running]
        shared, alone = blocks.split_shared(tables, candidate.table, candidate.num_tokens)
        remaining = [self._remaining(sequence) for sequence in (*running, candidate)]
        size = blocks.block_tokens
        peak = held = 0
        longest_first = sorted(zip(remaining, alone, strict=True), reverse=True)
        for count, (tokens, own) in enumerate(longest_first, start=1):
            held += own
            peak = max(peak, held + count * (-(-tokens // size) + 1))
        return shared + peak

    def _remaining(self, sequence: Sequence) -> int:
        """Tokens of kv that `sequence` will still need beyond those it has now."""
        fraction = sequence.order[1] * GOLDEN_RATIO % 1.0
        done = sequence.num_output_tokens
        total = self._lengths.quantile(fraction, done, sequence.request.params.max_tokens)
        return max(total - done - 1, 0)  # the last token is never fed back


def make_admission(config: SchedulerConfig) -> AdmissionPolicy:
    """The policy that `config.admission` names."""
    if config.admission == "aggressive":
        return Aggressive()
    if config.admission == "conservative":
        return Conservative()
    return PastFuture(config.history_requests)


def check_length(request: EngineRequest, context_tokens: int, blocks: BlockManager) -> None:
    """Raises RequestError when a request can never run, with the numbers."""
    num_prompt, max_tokens = len(request.token_ids), request.params.max_tokens
    if num_prompt == 0:
        raise RequestError("token_ids: the prompt has no tokens", field="token_ids")
    if num_prompt + max_tokens > context_tokens:
        raise RequestError(
            f"{num_prompt} prompt tokens and max_tokens {max_tokens} exceed the context of "
            f"{context_tokens} tokens",
            code=ErrorCode.CONTEXT_LENGTH,
            field="max_tokens",
            hint="shorten the prompt or lower max_tokens",
        )
    # The last token of an output is never fed back, so it needs no kv.
    needed = blocks.blocks_for(num_prompt + max(max_tokens - 1, 0))
    if needed > blocks.num_blocks:
        raise RequestError(
            f"{num_prompt} prompt tokens and max_tokens {max_tokens} need {needed} kv blocks of "
            f"{blocks.block_tokens} tokens; the pool has {blocks.num_blocks}",
            code=ErrorCode.CONTEXT_LENGTH,
            field="max_tokens",
            hint="lower max_tokens, or raise kv_bytes or num_blocks",
        )
