"""What a scheduler has done since its start."""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.core import EngineStats
from moeserve.engine.batch import ScheduledChunk
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.sequence import Sequence


@dataclass
class RequestCounts:
    """Since the start. recomputed_tokens: computed again after a preemption or a switch of kv."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    recomputed_tokens: int = 0
    requests_finished: int = 0

    def started(self, sequence: Sequence) -> None:
        """One started for the first time."""
        self.prompt_tokens += sequence.num_prompt_tokens
        self.cached_prompt_tokens += sequence.num_cached_tokens

    def computed(self, chunk: ScheduledChunk) -> None:
        """A chunk is computed; to be told before its sequence is."""
        again = min(chunk.stop, chunk.sequence.most_computed_tokens) - chunk.start
        self.recomputed_tokens += max(again, 0)

    def stats(self, num_running: int, num_waiting: int, blocks: BlockManager) -> EngineStats:
        """All that is known to a scheduler; step counts and times are the engine's."""
        return EngineStats(
            num_running=num_running,
            num_waiting=num_waiting,
            kv_blocks_used=blocks.num_held,
            kv_blocks_total=blocks.num_blocks,
            prefix_cached_blocks=blocks.num_idle,
            num_preemptions=self.preemptions,
            prompt_tokens=self.prompt_tokens,
            cached_prompt_tokens=self.cached_prompt_tokens,
            generated_tokens=self.generated_tokens,
            requests_finished=self.requests_finished,
            extra={"recomputed_tokens": float(self.recomputed_tokens)},
        )
