"""Every expert has a slot of its own, so nothing is ever evicted and nothing need be remembered."""

from __future__ import annotations

from collections.abc import Sequence

from moeserve.cache.numbering import Numbers
from moeserve.cache.policies.base import Policy


class ResidentPolicy(Policy):
    """Never gives up an expert."""

    name = "resident"

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Nothing to remember: no expert is ever a victim."""

    def loaded(self, number: int) -> None:
        """Nothing to remember."""

    def evicted(self, number: int) -> None:
        """Its slot was taken away by a smaller capacity; nobody gets it in its place."""

    def victims(
        self, candidates: Numbers, count: int, incoming: Numbers | None = None
    ) -> list[int]:
        return []
