"""Host memory as a device sees it: the source of copies, and where the CPU's experts stand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.numbering import Numbers
from moeserve.core import ExpertKey, LayerUse
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.experts.supply import Group
from moeserve.stats import CacheStats, LinkStats

Bytes = NDArray[np.uint8]


class Copier(Protocol):
    """Who makes copies from host memory."""

    def let_go(self) -> None:
        """Calls off copies that no step waits for and that have not begun."""

    def wait_for_copy(self) -> bool:
        """Until one more copy is complete; False where none is under way."""


class HostSide(ABC):
    """What a device's supply needs of the tier below it."""

    def read_by(self, copier: Copier) -> None:  # noqa: B027 - of interest where slots are few
        """Who is to be asked where slots are lacking."""

    @abstractmethod
    def which_ready(self, numbers: Numbers) -> NDArray[np.bool_]:
        """Of experts by their numbers, [n]: those whose copy could begin at once, [n]."""

    def observe(self, use: LayerUse) -> None:  # noqa: B027 - where nothing goes, nothing is learnt
        """What a step asks of a layer beyond what the device serves."""

    @abstractmethod
    def acquire(
        self, layer: int, experts: Sequence[int]
    ) -> AbstractContextManager[Iterator[Group]]:
        """The experts as they become readable, each group until the next is asked for. The first
        group is what is there already, maybe nothing; the rest is being read, in this order.

        The next group raises StoreError where a record cannot be read.
        """

    @abstractmethod
    def record(self, key: ExpertKey) -> Bytes:
        """The bytes of a pinned expert, and maybe more behind them."""

    # A copy: pinned when it is ordered, until it is complete or called off. A copy that a step
    # waits for pins what a group has made readable; others pin what is ready.

    def pin(self, key: ExpertKey) -> None:  # noqa: B027 - nothing goes
        """The expert's slot is given to nobody from now on."""

    def unpin(self, key: ExpertKey) -> None:  # noqa: B027
        """It may be."""

    def read_begins(self, key: ExpertKey, us: float) -> None:  # noqa: B027
        """A copy reads it from that time on, by the device's clock."""

    def read_ends(self, key: ExpertKey, us: float) -> None:  # noqa: B027
        """The copy is complete."""

    def collect(self) -> None:  # noqa: B027
        """Takes what has arrived meanwhile."""

    def stats(self) -> tuple[list[CacheStats], list[LinkStats]]:
        """As of an ExpertSupply."""
        return [], []

    def check_integrity(self, copied: set[ExpertKey]) -> None:  # noqa: B027
        """copied: whose copies are under way. AssertionError where the books do not agree."""

    def close(self) -> None:  # noqa: B027
        """As of an ExpertSupply."""


class WholeHost(HostSide):
    """All experts are in host memory and stay there."""

    def __init__(self, layers: Mapping[int, PackedExperts]) -> None:
        self._layers = layers

    def which_ready(self, numbers: Numbers) -> NDArray[np.bool_]:
        return np.ones(len(numbers), np.bool_)

    def acquire(
        self, layer: int, experts: Sequence[int]
    ) -> AbstractContextManager[Iterator[Group]]:
        return nullcontext(iter((tuple(experts),)))

    def record(self, key: ExpertKey) -> Bytes:
        record: Bytes = self._layers[key.layer].records[key.expert]
        return record
