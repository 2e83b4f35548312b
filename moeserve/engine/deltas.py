"""What a front is told of a sequence."""

from __future__ import annotations

from moeserve.core import EngineDelta, ErrorCode, FinishReason
from moeserve.engine.batch import SampledToken
from moeserve.engine.sequence import Sequence


def token_delta(
    sequence: Sequence, token: SampledToken | None, reason: FinishReason | None, now_s: float
) -> EngineDelta:
    """After a step that computed all of its tokens. Takes the prompt logprobs: they go out once.

    token: None where the request only wants its prompt scored. reason: None where it goes on.
    """
    prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
    stopped = reason is FinishReason.STOP
    logprob = None if token is None else token.logprob
    return EngineDelta(
        request_id=sequence.request_id,
        token_ids=[] if token is None else [token.token_id],
        logprobs=None if logprob is None else [logprob],
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=sequence.num_cached_tokens,
        finish_reason=reason,
        stop_token_id=token.token_id if token is not None and stopped else None,
        timing=None if reason is None else sequence.timing(now_s),
    )


def end_delta(
    sequence: Sequence,
    reason: FinishReason,
    now_s: float,
    error: str | None = None,
    error_code: ErrorCode | None = None,
) -> EngineDelta:
    """Of a request that something else than its own tokens ended."""
    return EngineDelta(
        request_id=sequence.request_id,
        num_cached_tokens=sequence.num_cached_tokens,
        finish_reason=reason,
        error=error,
        error_code=error_code,
        timing=sequence.timing(now_s),
    )
