"""Makes the experts of a placement readable: mediates between the cache, which knows what stands
where, the transfers, which move bytes, and the backend, which reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from moeserve.cache.expert_cache import ExpertCache
from moeserve.cache.types import LayerSlots
from moeserve.core import LayerUse, Placement
from moeserve.stats import CacheStats, LinkStats

Group = tuple[int, ...]


@dataclass(frozen=True)
class Supplied:
    """The experts of a placement as they become readable.

    slots: where they stand in the cache's tier. groups: what may be computed, each group until the
    next is asked for; together all of the placement, which says who computes what. A group may be
    empty.
    """

    slots: LayerSlots
    groups: Iterator[Group]


class ExpertSupply(ABC):
    """One for all MoE layers of a model. cache: of the fast tier."""

    cache: ExpertCache

    def observe(self, use: LayerUse, placement: Placement) -> None:
        """What a step asks of a layer, and where it is to run: every tier counts what it is asked
        for, and its policy learns. Before `acquire`."""
        self.cache.observe(use)

    @abstractmethod
    def acquire(self, placement: Placement) -> AbstractContextManager[Supplied]:
        """Pins what is there and begins to fetch what is not, before the context is entered.

        Raises CacheError where there are too few slots, StoreError where a record cannot be read.
        """

    def collect(self) -> None:  # noqa: B027 - where nothing moves, nothing arrives
        """Takes what has arrived meanwhile."""

    def check_integrity(self) -> None:  # noqa: B027 - where there are no books, nothing is wrong
        """AssertionError where the books do not agree. Called when the engine is idle."""

    def stats(self) -> tuple[list[CacheStats], list[LinkStats]]:
        """Of the tiers that hold fewer experts than there are, fastest first."""
        return [], []

    def close(self) -> None:  # noqa: B027 - as above
        """Ends threads and lets go of files. May be called twice."""


class ResidentSupply(ExpertSupply):
    """Everything stands in the fast tier."""

    def __init__(self, cache: ExpertCache) -> None:
        self.cache = cache

    @contextmanager
    def acquire(self, placement: Placement) -> Iterator[Supplied]:
        with self.cache.acquire(placement) as slots:
            yield Supplied(slots, iter((placement.on_cpu,)))

    def check_integrity(self) -> None:
        self.cache.check_integrity()
