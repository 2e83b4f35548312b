"""Text to learn from or to be judged on, as windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from moeserve.core import ConfigError
from moeserve.text.tokenizer import Tokenizer

#: what is read out of a directory
SUFFIXES = (".txt", ".md", ".py")


def read_texts(paths: Sequence[Path]) -> list[str]:
    """One text per file; directories stand for the texts in them, in the order of their names.

    Raises ConfigError for what cannot be read, and where there is nothing.
    """
    texts = []
    for path in paths:
        for file in _files(path):
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except OSError as error:
                why = error.strerror
                raise ConfigError(f"text: {file} cannot be read: {why}", field="text") from error
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"text: {file} cannot be read: {error}",
                    field="text",
                    hint="save it as UTF-8, such as with iconv -f LATIN1 -t UTF-8",
                ) from error
    if not any(texts):
        raise ConfigError(
            f"text: there is none in {', '.join(map(str, paths)) or 'nothing'}",
            field="text",
            hint=f"give files, or directories with {', '.join(SUFFIXES)} in them",
        )
    return texts


def recent_tokens(windows: Tensor, count: int) -> Tensor:
    """windows: [N, L]. [N, L, count]: the last tokens at every place, its own last, -1 before the
    window."""
    return pad(windows, (count - 1, 0), value=-1).unfold(1, count, 1)


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    yield from sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())


def token_windows(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    end_token: int | None,
    window_tokens: int,
    max_tokens: int | None,
) -> Tensor:
    """[N, window_tokens] int64: all texts in a row, an end token after each, cut without overlap.

    Where there is more than max_tokens, windows are left out evenly, so that every text counts.
    Raises ConfigError where it does not fill one window.
    """
    pieces = []
    for text in texts:
        pieces.append(np.array(tokenizer.encode(text), np.int64))
        if end_token is not None:
            pieces.append(np.array([end_token], np.int64))
    tokens = torch.from_numpy(np.concatenate(pieces))
    count = len(tokens) // window_tokens
    if count == 0:
        raise ConfigError(
            f"text: {len(tokens)} tokens do not fill a window of {window_tokens}",
            field="text",
            hint="give more text, or a smaller --window",
        )
    windows = tokens[: count * window_tokens].view(count, window_tokens)
    return windows if max_tokens is None else windows[evenly(count, max_tokens // window_tokens)]


def evenly(count: int, wanted: int) -> Tensor:
    """That many numbers below `count` (one at least, all at most), as far apart as can be."""
    wanted = min(max(1, wanted), count)
    return torch.arange(wanted) * count // wanted
