"""A lease: the experts that one layer of a running step reads."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from moeserve.cache.types import LayerSlots
from moeserve.core import Placement

if TYPE_CHECKING:
    from moeserve.cache.expert_cache import ExpertCache


class Lease:
    """A context manager: its experts keep their slots while it lasts.

    It may outlive the `with` block: the device still reads when the host has gone on. `until` says
    when the last reader is done (DESIGN, invariant 3); the cache asks when it next needs slots.
    """

    __slots__ = ("_cache", "_done", "experts", "outlived", "placement")

    def __init__(self, cache: ExpertCache, placement: Placement, experts: tuple[int, ...]) -> None:
        """experts: what of the placement stands in the cache's tier."""
        self._cache = cache
        self._done: Callable[[], bool] | None = None
        self.outlived = False  # the `with` block has ended, its readers have not
        self.placement = placement
        self.experts = experts

    def until(self, done: Callable[[], bool]) -> None:
        """The lease lasts until done() is true, at the earliest to the end of the `with` block."""
        self._done = done

    @property
    def finished(self) -> bool:
        return self._done is None or self._done()

    def pins(self, layer: int, expert: int) -> bool:
        return layer == self.placement.layer and expert in self.experts

    def forget(self, expert: int) -> None:
        """Its load failed under the lease: there is nothing left to read."""
        self.experts = tuple(e for e in self.experts if e != expert)

    def __enter__(self) -> LayerSlots:
        return self._cache.begin(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cache.end(self)
