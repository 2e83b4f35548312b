"""What comes out of a generation, as text: the types that fronts turn into their own format."""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.core import FinishReason


@dataclass(frozen=True)
class TopToken:
    """One of the most likely tokens at a position."""

    token_id: int
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True)
class TokenText:
    """One token with its log-probability and its place in the text.

    text: the token alone, U+FFFD where its bytes are no whole character; raw: its exact bytes.
    text_offset: characters of the prompt (prompt logprobs) or of the answer before the token.
    logprob, rank: None for the first token of a prompt, which nothing predicts.
    top: most likely first; as many as `logprobs` asked for.
    """

    token_id: int
    text: str
    raw: bytes
    text_offset: int
    logprob: float | None
    rank: int | None
    top: tuple[TopToken, ...] = ()


@dataclass(frozen=True)
class TextEvent:
    """More of answer `index`: whole characters, never a part of a stop string.

    token_ids: the tokens since the last event, the one that stopped the answer included. Text may
    come later than its tokens (a character over several tokens, a possible stop string).
    logprobs: one per token in token_ids, when asked for.
    stop: the stop string or stop token id that ended the answer; None for end-of-sequence by the
    model's own ids too when they were not asked for, and for every other finish_reason.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenText, ...] | None = None
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
