"""Every expert has a slot of its own, so nothing is ever evicted and nothing need be remembered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moeserve.cache.policies.base import Policy
from moeserve.core import ExpertKey


class ResidentPolicy(Policy):
    """Never gives up an expert."""

    name = "resident"

    def used(self, layer: int, experts: Iterable[int]) -> None:
        """Nothing to remember: no expert is ever a victim."""

    def loaded(self, key: ExpertKey) -> None:
        """Nothing to remember."""

    def evicted(self, key: ExpertKey) -> None:
        raise AssertionError(f"{key} was evicted although every expert is resident")

    def victims(self, candidates: Sequence[ExpertKey], count: int) -> list[ExpertKey]:
        return []
