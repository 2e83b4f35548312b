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
    """windows: [N, W] token ids; every HELD_BACK-th is measured on, the others are learnt from."""

    windows: Tensor

    def __post_init__(self) -> None:
        """Raises ConfigError where there is too little."""
        count, length = self.windows.shape
        if count < MIN_WINDOWS:
            raise ConfigError(
                f"text: {count} windows of {length} tokens; {MIN_WINDOWS} or more are needed",
                field="text",
                hint="give more text, or a smaller --window",
            )

    def held_back(self) -> Tensor:
        """[N] bool."""
        return torch.arange(len(self.windows)) % HELD_BACK == HELD_BACK - 1

    def rows(self) -> Tensor:
        """[N * W] bool: tokens that are held back."""
        return self.held_back().repeat_interleave(self.windows.shape[1])

    def digest(self) -> str:
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()[:16]
