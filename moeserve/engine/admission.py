"""Can a request ever run, and which of those that wait may start now? Three rules for the latter.

A request that starts too early makes kv run out later, and somebody is preempted; one that starts
too late waits although there was room. The rules differ in how they guess the length of outputs:

- `Aggressive`: not at all; the tokens there are now must fit.
- `Conservative`: every output gets as long as its `max_tokens`. Never preempts.
- `PastFuture` (past_future.py): as long as recent outputs were. Gong et al., "Past-Future Scheduler
  for LLM Serving under SLA Guarantees", ASPLOS 2025.

All rules count a block that several sequences share once, and an idle block as free.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import Protocol

from moeserve.config import SchedulerConfig
from moeserve.core import EngineRequest, ErrorCode, RequestError
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.past_future import PastFuture
from moeserve.engine.sequence import Sequence


class AdmissionPolicy(Protocol):
    def choose(
        self, candidates: Seq[Sequence], running: Collection[Sequence], blocks: BlockManager
    ) -> Sequence | None:
        """The first of `candidates` that may start beside those that run, or None.

        Their tables are matched, and the tokens of each fit now. All are asked about at once, so
        that what holds for each of them is computed once.
        """
        ...

    def observe(self, num_output_tokens: int) -> None:
        """An output is complete and that long; one cut by max_tokens counts as it is."""
        ...


class Aggressive:
    """Starts whatever fits now. `reserve`: part of the pool left for growth (a watermark)."""

    def __init__(self, reserve: float = 0.0) -> None:
        self._reserve = reserve

    def choose(
        self, candidates: Seq[Sequence], running: Collection[Sequence], blocks: BlockManager
    ) -> Sequence | None:
        room = blocks.num_available - int(self._reserve * blocks.num_blocks)
        for candidate in candidates:
            if blocks.num_blocks_to_take(candidate.table, candidate.num_tokens) <= room:
                return candidate
        return None

    def observe(self, num_output_tokens: int) -> None:
        """Learns nothing."""


class Conservative:
    """Starts what fits even if every output gets as long as its request allows."""

    def choose(
        self, candidates: Seq[Sequence], running: Collection[Sequence], blocks: BlockManager
    ) -> Sequence | None:
        growth = sum(blocks.blocks_for(s.max_kv_tokens) - len(s.block_ids) for s in running)
        room = blocks.num_available - growth
        for candidate in candidates:
            if blocks.num_blocks_to_take(candidate.table, candidate.max_kv_tokens) <= room:
                return candidate
        return None

    def observe(self, num_output_tokens: int) -> None:
        """Learns nothing."""


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
