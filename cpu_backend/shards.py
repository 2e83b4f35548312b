"""Which experts a worker holds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moeserve.core import ConfigError


@dataclass(frozen=True)
class Shard:
    """Of every layer the experts `first`, `first + step`, … up to `last` (None: to the end)."""

    first: int
    step: int = 1
    last: int | None = None

    @classmethod
    def parse(cls, text: str) -> Shard:
        """I/N: the experts e with e % N == I; A-B: those from A to B, both included.

        Raises ConfigError for anything else.
        """
        if part := re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text):
            index, count = int(part[1]), int(part[2])
            if index < count:
                return cls(index, count)
        elif part := re.fullmatch(r"([0-9]{1,6})-([0-9]{1,6})", text):
            first, last = int(part[1]), int(part[2])
            if first <= last:
                return cls(first, 1, last)
        raise ConfigError(
            f"shard: {text!r:.40} is neither I/N with I below N nor A-B",
            field="shard",
            hint="0/2 and 1/2 for two workers, or 0-63 for experts by their numbers",
        )

    def experts(self, num_experts: int) -> range:
        """Those of a layer with so many."""
        stop = num_experts if self.last is None else min(num_experts, self.last + 1)
        return range(self.first, stop, self.step)

    def __str__(self) -> str:
        return f"{self.first}/{self.step}" if self.last is None else f"{self.first}-{self.last}"
