"""What the cache of one tier answers with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moeserve.core import ErrorCode, ExpertKey, MoeserveError


class Tier(str, Enum):
    """Where expert weights live, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class ExpertState(Enum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"


class CacheError(MoeserveError):
    """The slots cannot hold what was asked for, or an expert was used against its state."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, code=ErrorCode.INTERNAL, hint=hint)


@dataclass(frozen=True)
class Load:
    """An order to a mover: write this expert into this slot, then `complete` or `abandon` it."""

    key: ExpertKey
    slot: int


@dataclass(frozen=True)
class Residency:
    """What of one layer is READY in the cache's tier."""

    layer: int
    tier: Tier
    num_experts: int
    ready: frozenset[int]

    @property
    def complete(self) -> bool:
        return len(self.ready) == self.num_experts


@dataclass(frozen=True)
class LayerSlots:
    """Where the experts of one layer stand: slots[e], -1 for those without a slot.

    version: grows with every change of `slots`, so that a copy on the device can be kept.
    loads: what must be written before the placement's `fetch_first` can be read.
    """

    layer: int
    slots: tuple[int, ...]
    version: int
    loads: tuple[Load, ...] = ()


@dataclass(frozen=True)
class SlotChange:
    """Slot numbers that came and went with a change of capacity.

    added: numbers that may be given to experts from now on. Numbers given up before come back
    first, lowest first; then the count goes on at the top.
    given_up: numbers that no expert stands in and none will be put into.
    """

    added: tuple[int, ...] = ()
    given_up: tuple[int, ...] = ()
