"""What the host tier asks of whoever reads records into its slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.record_copy import Urgency
from moeserve.cache.transfer import Arrival
from moeserve.cache.transfer_stats import TransferStats
from moeserve.cache.types import Load
from moeserve.core import ExpertKey
from moeserve.timeline import Timeline

#: the memory of a slot by its number
SlotMemory: TypeAlias = Callable[[int], NDArray[np.uint8]]


class Reads(Protocol):
    """`cache.transfer.Transfers`, or what takes its place where time is emulated."""

    timeline: Timeline

    @property
    def stats(self) -> TransferStats: ...

    @property
    def num_active(self) -> int: ...

    def none_finished(self) -> bool: ...

    def start(self, loads: Iterable[Load], urgency: Urgency) -> None: ...

    def promote(self, keys: Iterable[ExpertKey]) -> None: ...

    def cancel_prefetches(self) -> list[Load]: ...

    def finished(self) -> list[Arrival]: ...

    def wait(self, layer: int | None = None) -> list[Arrival]: ...

    def snapshot(self) -> TransferStats: ...

    def check_integrity(self) -> None: ...

    def close(self) -> None: ...
