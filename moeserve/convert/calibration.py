"""The text that a conversion learns from, and what of it is kept back to measure on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.core import ConfigError
from moeserve.text_windows import evenly

#: one window in so many is kept back
HELD_BACK = 5
MIN_WINDOWS = 5


@dataclass(frozen=True)
class Calibration:
    """learnt_from, held_back: [N, W] token ids. Rows of tokens come in that order. tuned_on: all of
    the text but what is held back. names: of the files and directories it came from."""

    learnt_from: Tensor
    held_back: Tensor
    tuned_on: Tensor
    names: tuple[str, ...] = ()

    @staticmethod
    def of(text: Tensor, max_tokens: int, names: tuple[str, ...] = ()) -> Calibration:
        """text: [N, W]. Of its windows as many as are wanted, taken evenly; every HELD_BACK-th of
        those is kept back.

        Raises ConfigError where there are too few, or too few are wanted.
        """
        least = MIN_WINDOWS * text.shape[1]
        if max_tokens < least:
            raise ConfigError(
                f"tokens: {max_tokens}; allowed: {least} or more, {MIN_WINDOWS} windows of "
                f"{text.shape[1]}",
                field="tokens",
                hint="ask for more, or give a smaller --window",
            )
        taken = evenly(len(text), max_tokens // text.shape[1])
        windows = text[taken]
        count, length = windows.shape
        if count < MIN_WINDOWS:
            raise ConfigError(
                f"text: {count} windows of {length} tokens; {MIN_WINDOWS} or more are needed",
                field="text",
                hint="give more text, or a smaller --window",
            )
        kept = torch.arange(count) % HELD_BACK == HELD_BACK - 1
        rest = torch.ones(len(text), dtype=torch.bool)
        rest[taken[kept]] = False
        return Calibration(windows[~kept], windows[kept], text[rest], names)

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
        """Of everything that is learnt from or measured on."""
        ids = torch.cat((self.token_ids, self.tuned_on.flatten()))
        return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
