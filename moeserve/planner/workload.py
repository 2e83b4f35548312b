"""Recorded traffic: when requests came, and how long their prompts and outputs were."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moeserve.core import ConfigError

#: tokens of one of Mooncake's blocks
MOONCAKE_BLOCK = 512


@dataclass(frozen=True)
class WorkloadRequest:
    """at_s: from the trace's own zero. hash_ids: of the prompt's blocks, equal where prefixes are
    equal; empty where the trace does not say."""

    at_s: float
    num_prompt: int
    num_output: int
    hash_ids: tuple[int, ...] = ()

    def tokens(self, number: int) -> list[int]:
        """Prompt ids: equal exactly where the trace says that prefixes are equal. number: of the
        request, for a prompt like no other's."""
        if not self.hash_ids:
            return [number] * self.num_prompt
        tokens: list[int] = []
        for hash_id in self.hash_ids:
            tokens += [hash_id] * min(MOONCAKE_BLOCK, self.num_prompt - len(tokens))
        return tokens


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival; the first comes at 0 s.

    num_dropped: requests of the file without a prompt or an answer.
    """

    name: str
    requests: tuple[WorkloadRequest, ...]
    num_dropped: int = 0

    @property
    def span_s(self) -> float:
        """Between the first and the last arrival."""
        return self.requests[-1].at_s

    @property
    def longest(self) -> int:
        """Prompt and output of the longest request, in tokens."""
        return max(request.num_prompt + request.num_output for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        return sum(request.num_prompt for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(request.num_output for request in self.requests)

    def as_json(self) -> dict[str, Any]:
        """What tells it from the same file with other flags."""
        return {
            "name": self.name,
            "span_s": self.span_s,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "dropped": self.num_dropped,
        }

    @property
    def in_words(self) -> str:
        """How many requests there are, and how many were left out."""
        dropped = f" ({self.num_dropped} without a prompt or an answer left out)"
        return f"{len(self.requests)} requests{dropped if self.num_dropped else ''}"

    def first(self, count: int) -> Workload:
        return replace(self, requests=self.requests[:count])

    def clipped(self, most_tokens: int) -> Workload:
        """Every request within so many tokens: outputs at most half of them, prompts what is left,
        cut at the end."""
        if most_tokens < 2:
            raise ConfigError(f"clip: {most_tokens}; allowed: 2 or more", field="clip")
        clipped = []
        for request in self.requests:
            num_output = min(request.num_output, most_tokens // 2)
            num_prompt = min(request.num_prompt, most_tokens - num_output)
            blocks = request.hash_ids[: -(-num_prompt // MOONCAKE_BLOCK)]
            clipped.append(
                replace(request, num_prompt=num_prompt, num_output=num_output, hash_ids=blocks)
            )
        return replace(self, requests=tuple(clipped))

    def faster(self, speed: float) -> Workload:
        """With all times divided by speed, so that bursts stay."""
        if not speed > 0:
            raise ConfigError(f"speed: {speed}; allowed: above 0", field="speed")
        if self.span_s / speed == float("inf"):
            raise ConfigError(f"speed: {speed}: at it the trace never ends", field="speed")
        return replace(self, requests=tuple(replace(r, at_s=r.at_s / speed) for r in self.requests))
