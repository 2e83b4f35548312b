"""Standard output that cannot be written is an error with a name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from moeserve.core import ConfigError


@contextmanager
def printing() -> Iterator[None]:
    """Around what prints, and nothing else. ConfigError for a full disk or a closed pipe."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):  # what its buffer still has would fail again when Python ends
            sys.stdout.close()
        raise ConfigError(
            f"stdout: cannot be written: {error.strerror}",
            field="stdout",
            hint="print to where there is room, and read all of it",
        ) from error
