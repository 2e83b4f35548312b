"""One request on its way through the engine."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto

from moeserve.core import EngineRequest, EngineTiming, FinishReason, TokenLogprob
from moeserve.engine.block_table import BlockTable


class SequenceState(Enum):
    WAITING = auto()  # not started, or preempted: holds no blocks
    RUNNING = auto()  # holds blocks for all its tokens so far
    FINISHED = auto()


class Sequence:
    """A request with its tokens, its kv blocks and its place in the order.

    token_ids: prompt, then output. Tokens `[0, num_computed_tokens)` have their kv in the blocks.
    Between steps a running sequence in decode has exactly one token that is not computed: the one
    sampled last, whose logits choose the next. Preemption sets `num_computed_tokens` back and
    keeps the tokens, so recompute is a prefill over prompt and output.
    Times are `time.time()` seconds. Compared by identity.
    """

    def __init__(self, request: EngineRequest, arrival: int, now_s: float) -> None:
        self.request = request
        self.order = (request.priority, arrival)  # smaller goes first, in every queue
        self.state = SequenceState.WAITING
        self.token_ids = list(request.token_ids)
        self.num_prompt_tokens = len(request.token_ids)
        self.num_computed_tokens = 0
        self.table = BlockTable()
        self.num_cached_tokens = 0  # prompt tokens whose kv was reused at first admission
        self.num_preemptions = 0
        self.num_overtaken = 0  # starts of requests behind it while it waited
        self.most_computed_tokens = 0  # before preemptions; below it, computing is recomputing
        # Entry p scores prompt token p; nothing comes before the first. None: not asked for.
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        if request.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.arrived_s = now_s
        self.started_s: float | None = None  # first admitted
        self.first_token_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def block_ids(self) -> list[int]:
        return self.table.block_ids

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens_to_compute(self) -> int:
        """Tokens whose kv is missing: 1 in decode, more in prefill and recompute."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def max_kv_tokens(self) -> int:
        """Tokens with kv at the longest output; the last sampled token is never fed back."""
        return self.num_prompt_tokens + max(self.request.params.max_tokens - 1, 0)

    @property
    def num_reusable_tokens(self) -> int:
        """How long a reused prefix may be.

        One token at least must be computed, because its logits choose the next. While logits at
        the prompt positions are still owed (prompt logprobs) every position must be.
        """
        scored = self.prompt_logprobs
        if scored is not None and len(scored) < self.num_prompt_tokens:
            return 0
        return len(self.token_ids) - 1

    def positions_to_score(self, stop: int) -> range:
        """Prompt positions not scored yet whose scores follow from computing up to `stop`."""
        known = self.prompt_logprobs
        return (
            range(0) if known is None else range(len(known), min(stop + 1, self.num_prompt_tokens))
        )

    def stop_reason(self, eos_token_ids: Collection[int]) -> FinishReason | None:
        """Whether the last token ends it: an id it stops at, or its length."""
        params, token_id = self.request.params, self.token_ids[-1]
        is_eos = token_id in eos_token_ids and not params.ignore_eos
        if is_eos or token_id in params.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_output_tokens >= params.max_tokens else None

    def timing(self, now_s: float) -> EngineTiming:
        """Seconds spent waiting, until the first token, and after it, up to `now_s`."""
        started_s = now_s if self.started_s is None else self.started_s
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        return EngineTiming(
            queued_s=started_s - self.arrived_s,
            prefill_s=first_token_s - started_s,
            decode_s=now_s - first_token_s,
        )
