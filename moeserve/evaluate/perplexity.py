"""Perplexity from the engine's own log-probabilities of a prompt's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from moeserve.llm import LLM

#: windows that are in the engine together
TOGETHER = 8


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-probability of `num_tokens` tokens; nats: that mean.

    Of every window all tokens count but the first, each given those before it in its window.
    """

    perplexity: float
    nats: float
    num_tokens: int
    num_windows: int
    window_tokens: int


def measure_perplexity(
    llm: LLM, windows: Tensor, progress: Callable[[str, float], None]
) -> Perplexity:
    """windows: [N, W] token ids, W at most the model's context. Raises RequestError."""
    count, length = windows.shape
    rows: Sequence[list[int]] = windows.tolist()
    total = 0.0
    for start in range(0, count, TOGETHER):
        progress("perplexity", start / count)
        results = llm.generate(rows[start : start + TOGETHER], max_tokens=0, prompt_logprobs=0)
        for result in results:
            scored = result.prompt_logprobs
            assert scored is not None, "they were asked for"
            known = [token.logprob for token in scored if token.logprob is not None]
            assert len(known) == length - 1, f"{len(known)} scores for {length} tokens"
            total -= math.fsum(known)
    num_tokens = count * (length - 1)
    nats = total / num_tokens
    return Perplexity(math.exp(nats), nats, num_tokens, count, length)
