"""Can a request ever run, and may one that waits start now? Three rules for the latter.

A request that starts too early makes kv run out later, and somebody is preempted; one that starts
too late waits although there was room. The rules differ in how they guess the length of outputs:

- `Aggressive`: not at all; the tokens there are now must fit.
- `Conservative`: every output gets as long as its `max_tokens`. Never preempts.
- `PastFuture`: as long as recent outputs were. Gong et al., "Past-Future Scheduler for LLM Serving
  under SLA Guarantees", ASPLOS 2025.

All rules count a block that several sequences share once, and an idle block as free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from moeserve.config import SchedulerConfig
from moeserve.core import EngineRequest, ErrorCode, RequestError
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.sequence import Sequence

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

#: Standard deviations of room above the expected use: kv runs out in about one of ten cases that
#: come close (0.07 by a normal distribution; exp(-1.5^2) = 0.11 where one end of a sequence is
#: enough, when the number of ends is nearly Poisson). More costs room, and an overflow is cheap:
#: the blocks of who is preempted stay in the prefix index until they are overwritten.
RISK_DEVIATIONS: Final = 1.5
#: Steps from now at which the use is predicted, besides the last possible one.
STEPS: Final = np.unique(np.floor(1.25 ** np.arange(75)).astype(np.int64))


class AdmissionPolicy(Protocol):
    def admits(
        self, candidate: Sequence, running: Collection[Sequence], blocks: BlockManager
    ) -> bool:
        """May `candidate`, whose table is matched and whose tokens fit now, start?"""
        ...

    def observe(self, num_output_tokens: int) -> None:
        """An output is complete and that long; one cut by max_tokens counts as it is."""
        ...


class Aggressive:
    """Starts whatever fits now. `reserve`: part of the pool left for growth (a watermark)."""

    def __init__(self, reserve: float = 0.0) -> None:
        self._reserve = reserve

    def admits(
        self, candidate: Sequence, running: Collection[Sequence], blocks: BlockManager
    ) -> bool:
        take = blocks.num_blocks_to_take(candidate.table, candidate.num_tokens)
        return take <= blocks.num_available - int(self._reserve * blocks.num_blocks)

    def observe(self, num_output_tokens: int) -> None:
        """Learns nothing."""


class Conservative:
    """Starts what fits even if every output gets as long as its request allows."""

    def admits(
        self, candidate: Sequence, running: Collection[Sequence], blocks: BlockManager
    ) -> bool:
        take = blocks.num_blocks_to_take(candidate.table, candidate.max_kv_tokens)
        growth = sum(blocks.blocks_for(s.max_kv_tokens) - len(s.block_ids) for s in running)
        return take + growth <= blocks.num_available

    def observe(self, num_output_tokens: int) -> None:
        """Learns nothing."""


class OutputLengths:
    """The last `size` output lengths, and the chance that an output still running goes on."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._recent: deque[int] = deque()
        # Entry n: how many of them are longer than n tokens. The last entry stays 0.
        self._longer = np.zeros(1, np.int64)

    def add(self, num_tokens: int) -> None:
        if len(self._recent) == self._size:
            self._longer[: self._recent.popleft()] -= 1
        self._recent.append(num_tokens)
        if num_tokens >= len(self._longer):
            known = self._longer
            self._longer = np.zeros(2 * num_tokens, np.int64)
            self._longer[: len(known)] = known
        self._longer[:num_tokens] += 1

    def going_on(self, done: IntArray, steps: IntArray, longest: IntArray) -> FloatArray:
        """P(length > done + steps, given that it is > done), [S, H].

        done: [S] tokens so far, steps: [H], longest: [S] tokens the request allows. That limit
        counts as one more observation: with nothing known above `done` it is the answer, and it
        fades as knowledge grows. So an empty history behaves like the conservative rule without a
        branch for it.
        """
        later = done[:, None] + steps  # [S, H]
        share = (self._longer_than(later) + 1) / (self._longer_than(done) + 1)[:, None]
        return np.where(later < longest[:, None], share, 0.0)

    def _longer_than(self, num_tokens: IntArray) -> IntArray:
        return self._longer[np.minimum(num_tokens, len(self._longer) - 1)]


class PastFuture:
    """Starts what keeps the predicted peak of kv within the pool.

    Past: p_j(h), the share of recent outputs that went on for more than h steps, among those that
    got as long as sequence j is now. Future: all decode in step, and after h steps sequence j has
    b_j(h) blocks of its own, or has ended and given them back. For independent outputs the use of
    the pool after h steps has

        mean      M(h) = S + sum_j p_j(h) b_j(h)
        variance  V(h) = sum_j p_j(h) (1 - p_j(h)) b_j(h)^2

    with the S blocks that several sequences share, as held to the end. It is never more than
    A(h) = S + sum_j b_j(h), which is what happens when nobody ends. The predicted peak is

        max over h of min(A(h), M(h) + RISK_DEVIATIONS * sqrt(V(h)))

    A(h) grows slowly, the other term falls as ends become likely; where they meet, the pool must
    have room. Network links admit independent on-off sources by the same Gaussian approximation
    (Guerin, Ahmadi and Naghshineh, "Equivalent Capacity", IEEE JSAC 9(7), 1991).

    The paper draws one length per request at random, anew on every step, takes the peak of the
    draw, and leaves a fixed part of the pool for the error. But a refused request is asked about on
    every step, so sooner or later a draw is too low, and that one is acted upon. And the error has
    a size of its own: kv runs out when growth fills what is free before somebody ends, so what is
    needed is the growth between two ends, a few blocks where outputs are short, however long the
    prompts are and however many run. The deviation of the sum says that without a parameter for
    the pool or for a sequence.
    """

    def __init__(self, history_requests: int) -> None:
        self._lengths = OutputLengths(history_requests)

    def observe(self, num_output_tokens: int) -> None:
        self._lengths.add(num_output_tokens)

    def admits(
        self, candidate: Sequence, running: Collection[Sequence], blocks: BlockManager
    ) -> bool:
        return self.peak_blocks(candidate, running, blocks) <= blocks.num_blocks

    def peak_blocks(
        self, candidate: Sequence, running: Collection[Sequence], blocks: BlockManager
    ) -> float:
        """Predicted peak use of the pool if `candidate` starts now."""
        everyone = (*running, candidate)
        shared, alone = blocks.split_shared(
            [sequence.table for sequence in running], candidate.table, candidate.num_tokens
        )
        tokens, done, longest = np.array(
            [(s.num_tokens, s.num_output_tokens, s.request.params.max_tokens) for s in everyone]
        ).T  # [S] each
        last = int((longest - done).max()) - 1
        steps = np.append(STEPS[: np.searchsorted(STEPS, last)], last)  # [H]
        size = blocks.block_tokens
        # A block that a sequence holds already may have room for tokens to come.
        spare = (-tokens) % size  # [S]
        growth = (steps - spare[:, None] + size - 1) // size  # [S, H]
        held = np.array(alone)[:, None] + np.maximum(growth, 0)
        share = self._lengths.going_on(done, steps, longest)
        expected = share * held
        mean = expected.sum(0)  # [H]
        deviation = np.sqrt((expected * (1 - share) * held).sum(0))
        most = (held * (share > 0)).sum(0)
        future = np.minimum(most, mean + RISK_DEVIATIONS * deviation)
        return shared + max(float(sum(alone)), float(future.max()))


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
