"""Within one layer and step: which expert runs where."""

from __future__ import annotations

from abc import ABC, abstractmethod

from moeserve.cache.expert_cache import Residency, Tier
from moeserve.core import Placement, Routing


class IntraLayerScheduler(ABC):
    """Turns a routing into a placement, given what is resident."""

    @abstractmethod
    def place(self, routing: Routing, residency: Residency) -> Placement:
        """Every expert that `routing` names is in exactly one of the placement's three sets."""


class ResidentPlacement(IntraLayerScheduler):
    """Runs every expert where it stands, which is where the whole layer stands.

    The placement names all experts of the layer instead of the chosen ones: nothing is to be moved,
    so nobody need know which were chosen, and a device is not kept waiting until the host has read
    the ids. It is the same object in every step.
    """

    def __init__(self) -> None:
        self._placements: dict[int, Placement] = {}

    def place(self, routing: Routing, residency: Residency) -> Placement:
        placement = self._placements.get(residency.layer)
        if placement is None:
            assert residency.complete, f"layer {residency.layer} is not wholly resident"
            everything = tuple(range(residency.num_experts))
            if residency.tier is Tier.DEVICE:
                placement = Placement(residency.layer, on_device=everything)
            else:
                placement = Placement(residency.layer, on_cpu=everything)
            self._placements[residency.layer] = placement
        return placement
