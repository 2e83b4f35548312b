"""The Past-Future rule: what starts must keep the predicted peak of kv within the pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True)
class _Uses:
    """What sequences hold now, and how far they may get; arrays [S].

    tokens: they have. done: of them output. longest: output that their requests allow.
    alone: blocks that nobody else holds.
    """

    tokens: IntArray
    done: IntArray
    longest: IntArray
    alone: IntArray

    @classmethod
    def of(cls, sequences: Iterable[Sequence], alone: Seq[int]) -> _Uses:
        rows = [(s.num_tokens, s.num_output_tokens, s.request.params.max_tokens) for s in sequences]
        tokens, done, longest = np.array(rows, np.int64).reshape(-1, 3).T
        return cls(tokens, done, longest, np.array(alone, np.int64))

    @property
    def last(self) -> IntArray:
        """The last step of each, if its output gets as long as it may."""
        return self.longest - self.done - 1

    def at(self, places: Seq[int]) -> _Uses:
        """Those at the places, of which some may be the same."""
        return _Uses(*(part[places] for part in (self.tokens, self.done, self.longest, self.alone)))

    def terms(self, lengths: OutputLengths, steps: IntArray, block_tokens: int) -> FloatArray:
        """Each one's part in M, in V and in A - S, after so many steps; [3, S, H]."""
        # A block that a sequence holds already may have room for tokens to come.
        spare = (-self.tokens) % block_tokens
        growth = (steps - spare[:, None] + block_tokens - 1) // block_tokens  # [S, H]
        held = self.alone[:, None] + np.maximum(growth, 0)
        share = lengths.going_on(self.done, steps, self.longest)
        expected = share * held
        return np.stack([expected, expected * (1 - share) * held, held * (share > 0)])


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

    def choose(
        self, candidates: Seq[Sequence], running: Collection[Sequence], blocks: BlockManager
    ) -> Sequence | None:
        """See AdmissionPolicy."""
        peaks = self.peak_blocks(candidates, running, blocks)
        fitting = np.flatnonzero(peaks <= blocks.num_blocks)
        return candidates[fitting[0]] if fitting.size else None

    def peak_blocks(
        self, candidates: Seq[Sequence], running: Collection[Sequence], blocks: BlockManager
    ) -> FloatArray:
        """[C]: the predicted peak use of the pool if that candidate alone starts now.

        The sums over those that run are made once. A candidate adds its own terms; where it would
        share blocks that one of them holds alone, these become blocks that several share.
        """
        tables = [sequence.table for sequence in running]
        shared, alone = blocks.split_shared(tables)
        joins = [blocks.joining(c.table, c.num_tokens, tables) for c in candidates]
        now = _Uses.of((*running, *candidates), alone + [join.num_alone for join in joins])
        first = len(alone)  # of the candidates
        num_shared = np.array([join.num_shared for join in joins])
        last = np.maximum(now.last[first:], now.last[:first].max(initial=0))  # [C]
        common = STEPS[: np.searchsorted(STEPS, last.max())]  # [H], those of every candidate
        steps, size = np.append(common, last), blocks.block_tokens
        terms = now.terms(self._lengths, steps, size)
        sums = terms[:, :first].sum(1)[:, None] + terms[:, first:]  # [3, C, H + C]
        sharing = np.flatnonzero(num_shared)
        if sharing.size:
            holders = now.at([join.holder for join in joins if join.holder is not None])
            fewer = replace(holders, alone=holders.alone - num_shared[sharing])
            sums[:, sharing] -= holders.terms(self._lengths, steps, size)
            sums[:, sharing] += fewer.terms(self._lengths, steps, size)
        mean, variance, most = sums
        deviation = np.sqrt(np.maximum(variance, 0))  # a difference may round to less than 0
        future = np.minimum(most, mean + RISK_DEVIATIONS * deviation)
        at_last = future[:, len(common) :].diagonal()
        future_peak = np.maximum(future[:, : len(common)].max(1, initial=0), at_last)
        start_peak = sum(alone) + now.alone[first:] - num_shared
        peaks: FloatArray = shared + num_shared + np.maximum(start_peak, future_peak)
        return peaks
