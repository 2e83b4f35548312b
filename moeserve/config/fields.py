"""How a setting is written down, and the checks that settings share."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from moeserve.core import ConfigError


def setting(default: Any, text: str) -> Any:
    """A dataclass field with its one line of documentation, which is also the help of its flag."""
    return field(default=default, metadata={"help": text})


def one_of(name: str, value: str, allowed: tuple[str, ...], fix: str = "") -> None:
    if value not in allowed:
        tail = f"; {fix}" if fix else ""
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(allowed)}{tail}", field=name)


def at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name}: {value} is below the minimum {least}", field=name)
