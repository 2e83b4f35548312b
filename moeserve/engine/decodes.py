"""Which running sequences decode in a step, and who gives way when their kv grows."""

from __future__ import annotations

from collections.abc import Callable, Container

from moeserve.config import SchedulerConfig
from moeserve.engine.batch import ScheduledChunk
from moeserve.engine.decode_groups import PredictedExperts, make_decode_groups
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.sequence import Sequence
from moeserve.engine.sequence_queue import SequenceQueue


class Decodes:
    """One token each, in the order of the queue. When one finds no block, the last gives way."""

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, predicted: PredictedExperts | None
    ) -> None:
        """predicted: what `config.decode_group` groups by; ConfigError where that is set and this
        is None."""
        self._blocks = blocks
        self._groups = make_decode_groups(config, predicted)

    def chunks(
        self, running: SequenceQueue, now_s: float, give_way: Callable[[Sequence], None]
    ) -> list[ScheduledChunk]:
        """One token for every running sequence that lacks just one, or for a group of them.

        give_way: gets those taken out of `running` for want of kv, and takes their blocks.
        """
        if self._groups is None:
            return self._grow(None, running, give_way)
        ready = [s for s in running if s.num_tokens_to_compute == 1]
        chunks = self._grow(frozenset(self._groups.choose(ready, now_s)), running, give_way)
        if chunks:
            return chunks
        # Each of the group had to give way for want of kv. The first in order never has to.
        return self._grow(frozenset(ready[: self._groups.size]), running, give_way)

    def _grow(
        self,
        group: Container[Sequence] | None,
        running: SequenceQueue,
        give_way: Callable[[Sequence], None],
    ) -> list[ScheduledChunk]:
        """One token for every sequence of the group (None: of all) that lacks just one."""
        chunks: list[ScheduledChunk] = []
        position = 0
        # Victims come from the end, and this walks from the front: no victim is in `chunks` yet.
        while position < len(running):
            sequence = running[position]
            position += 1
            left_out = group is not None and sequence not in group
            if sequence.num_tokens_to_compute > 1 or left_out:
                continue
            while not self._blocks.extend(sequence.table, sequence.num_tokens):
                victim = running.pop_last()
                give_way(victim)
                if victim is sequence:
                    break
            else:
                chunks.append(ScheduledChunk.of(sequence, 1, self._blocks))
        return chunks
