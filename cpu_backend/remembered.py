"""Measured times of backends, kept in a file in the user's cache directory.

The file is a convenience: one that cannot be read or written, or that another program wrote, costs
a measurement and is never an error.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import msgspec

logger = logging.getLogger(__name__)

FORMAT = 1
#: home directories are shared between machines; a file for all of them stays small
MOST_ENTRIES = 64


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the times depend on. Versions: None where a package is not installed."""

    cpu: str
    isa: str
    num_threads: int
    dtype: str
    moeserve: str
    torch: str
    ipex: str | None


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """layer_ms: milliseconds of a layer by backend, for each of measurement.NUM_CALLS.

    failed: backends that could not be measured, and why. date: ISO 8601, local.
    """

    machine: Machine
    date: str
    layer_ms: dict[str, list[float]]
    failed: dict[str, str] = {}


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: int
    measured: list[Measured]


def recall(path: Path, machine: Machine) -> Measured | None:
    """What was measured on such a machine before, None where nothing was."""
    return next((entry for entry in _read(path) if entry.machine == machine), None)


def remember(path: Path, measured: Measured) -> None:
    """Puts `measured` in the file, in the place of what was there for the same machine."""
    others = [entry for entry in _read(path) if entry.machine != measured.machine]
    content = _File(format=FORMAT, measured=[measured, *others][:MOST_ENTRIES])
    encoded = msgspec.json.format(msgspec.json.encode(content))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Replaced as a whole: a reader sees the old file or the new one, never a part.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
            written = Path(directory) / path.name
            written.write_bytes(encoded)
            written.replace(path)
    except OSError as error:
        logger.warning("cpu backend: measured times are not kept, %s", error)


def _read(path: Path) -> list[Measured]:
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        logger.warning("cpu backend: %s cannot be used, measuring again: %s", path, error)
        return []
    if content.format != FORMAT:
        logger.warning("cpu backend: %s has format %d, measuring again", path, content.format)
        return []
    return content.measured
