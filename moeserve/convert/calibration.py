"""The text that a conversion learns from, and what of it is kept back to measure on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.core import ConfigError

#: one window in so many is kept back
HELD_BACK = 5
MIN_WINDOWS = 5


@dataclass(frozen=True)
class Calibration:
    """learnt_from, held_back: [N, W] token ids. Rows of tokens come in that order."""

    learnt_from: Tensor
    held_back: Tensor

    @staticmethod
    def of(windows: Tensor) -> Calibration:
        """windows: [N, W], of which every HELD_BACK-th is kept back.

        Raises ConfigError where there are too few.
        """
        count, length = windows.shape
        if count < MIN_WINDOWS:
            raise ConfigError(
                f"text: {count} windows of {length} tokens; {MIN_WINDOWS} or more are needed",
                field="text",
                hint="give more text, or a smaller --window",
            )
        kept = torch.arange(count) % HELD_BACK == HELD_BACK - 1
        return Calibration(windows[~kept], windows[kept])

    @property
    def window_tokens(self) -> int:
        return self.learnt_from.shape[1]

    @property
    def learnt_rows(self) -> slice:
        """Of the rows of all tokens."""
        return slice(0, self.learnt_from.numel())

    @property
    def held_back_rows(self) -> slice:
        return slice(self.learnt_from.numel(), None)

    @property
    def token_ids(self) -> Tensor:
        """[T] of all rows."""
        return torch.cat((self.learnt_from, self.held_back)).flatten()

    def digest(self) -> str:
        return hashlib.sha256(self.token_ids.numpy().tobytes()).hexdigest()[:16]
