"""Which of the waiting sequences starts next.

A waiting request that kv has no room for, a long prompt mostly, may be overtaken by smaller ones of
its priority behind it, which would otherwise wait beside room that nobody uses. Everyone is
overtaken a limited number of times and then starts next, so nobody starves
(`SequenceQueue.in_turn`). Backfilling, as batch systems call it (Feitelson and Weil, "Utilization
and Predictability in Scheduling the IBM SP2 with Backfilling", IPPS 1998), but with a count in
place of the reservation that theirs makes from the run times that users state.
"""

from __future__ import annotations

from moeserve.config import SchedulerConfig
from moeserve.engine.admission import AdmissionPolicy
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.sequence import Sequence
from moeserve.engine.sequence_queue import SequenceQueue


class Entrance:
    """Asks the admission rule about those whose turn it may be. Keeps nothing between two calls."""

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, admission: AdmissionPolicy
    ) -> None:
        # With no more sequences than tokens in a step, every decode can run in every step.
        self.max_running = min(config.max_running, config.max_batch_tokens)
        self._overtaking = config.overtaking
        self._blocks = blocks
        self._admission = admission

    def next(self, waiting: SequenceQueue, running: SequenceQueue) -> Sequence | None:
        """The first waiting sequence that may start, with its table matched; None where none may.

        Alone everybody may start, whatever is predicted: `RequestScheduler.add` saw that it fits.
        """
        if len(running) >= self.max_running:
            return None
        candidates = self._candidates(waiting)
        if candidates and running:
            return self._admission.choose(candidates, running, self._blocks)
        return candidates[0] if candidates else None

    def _candidates(self, waiting: SequenceQueue) -> list[Sequence]:
        """Those that fit now, in turn, each smaller than all before it: where one is refused, so is
        whoever wants as much."""
        candidates: list[Sequence] = []
        least_wanted = self._blocks.num_available + 1
        for sequence in waiting.in_turn(self._overtaking):
            table, token_ids = sequence.table, sequence.token_ids
            self._blocks.match(table, token_ids, sequence.num_reusable_tokens)
            wanted = self._blocks.num_blocks_to_take(table, sequence.num_tokens)
            if wanted < least_wanted:
                candidates.append(sequence)
                least_wanted = wanted
        return candidates
