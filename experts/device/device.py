"""What the device tier asks of a device: a real one, or one that is emulated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol

from moeserve.cache.transfer_stats import TransferStats
from moeserve.cache.types import Load
from moeserve.core import ExpertKey
from moeserve.experts.host_side import HostSide
from moeserve.experts.schedule.cost_model import CostModel


class DeviceSlots(Protocol):
    """The memory of the slots, numbered from 0."""

    slot_bytes: int

    def grow(self, num_slots: int) -> None:
        """Makes sure that there are at least so many. MemoryError: there is no room."""

    def give_back(self, slot: int) -> None:
        """Nothing will be put there, until `take_back`."""

    def take_back(self, slot: int) -> None:
        """The slot is to be written again."""


class Device(ABC):
    """Slots, a link that fills them from host memory, and a processor. For one thread.

    source: host memory, which copies are made from; a copy reads what the supply has pinned there.
    """

    @property
    @abstractmethod
    def slots(self) -> DeviceSlots: ...

    @property
    @abstractmethod
    def source(self) -> HostSide: ...

    @abstractmethod
    def now_us(self) -> float:
        """By the clock that its work goes by."""

    @abstractmethod
    def costs(self, layer: int) -> CostModel:
        """Of the experts of a layer, with device and link."""

    @abstractmethod
    def prefetch(self, loads: Sequence[Load]) -> None:
        """Begins to copy into slots when the link has nothing else."""

    @abstractmethod
    def demand(self, loads: Sequence[Load]) -> None:
        """Begins to copy what a step waits for, in that order, before any prefetch."""

    @abstractmethod
    def promote(self, keys: Iterable[ExpertKey]) -> None:
        """Prefetches that a step now waits for become demands. keys: others may be among them."""

    @abstractmethod
    def cancel_prefetches(self) -> list[Load]:
        """Calls off those of which nothing was copied yet; their slots are as they were."""

    @abstractmethod
    def finished(self) -> list[Load]:
        """What has been copied meanwhile; each is told once."""

    @abstractmethod
    def wait_for_copy(self) -> bool:
        """Until `finished` has something; False where no copy is under way."""

    @abstractmethod
    def copying(self) -> set[ExpertKey]:
        """Whose copies nobody has been told of as finished."""

    @abstractmethod
    def loading_us(self, layer: int) -> dict[int, float]:
        """What of a layer is being prefetched, and what is left of each copy."""

    @abstractmethod
    def link_left_us(self) -> float:
        """Until the link has made all copies that it was asked for."""

    @abstractmethod
    def link_busy_s(self) -> float:
        """For how long the link has been moving anything so far."""

    @abstractmethod
    def link_stats(self) -> TransferStats:
        """What the link has done so far, all of one moment."""

    @abstractmethod
    def is_idle(self) -> bool:
        """Nothing that was submitted is still to be done."""

    def end_layer(self) -> None:  # noqa: B027 - where time passes by itself
        """The experts of a layer are done; what else belongs to a layer follows."""

    def close(self) -> None:  # noqa: B027 - where there are no threads
        """Ends its threads. May be called twice."""
