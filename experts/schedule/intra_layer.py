"""Within one layer and step: which expert runs where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import inf
from typing import TypeAlias

import numpy as np

from moeserve.cache.expert_cache import Residency, Tier
from moeserve.core import LayerUse, Placement
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.timeline import fill, run_as_fetched_us

#: by layer: which of its experts are being copied, and how long that takes from now if it is done
#: at once, each by itself, in microseconds
Loading: TypeAlias = Callable[[int], Mapping[int, float]]


#: by layer and experts: what each of them is worth for later uses if it is fetched now, beyond what
#: would lose its slot, in microseconds
KeptUs: TypeAlias = Callable[[int, Sequence[int]], Sequence[float]]


def nothing_is_kept(layer: int, experts: Sequence[int]) -> Sequence[float]:
    """Where nobody says what later uses are worth."""
    return [0.0] * len(experts)


def nothing_is_loading(layer: int) -> Mapping[int, float]:
    """For a mover that does not say: experts on their way count as absent."""
    return {}


class IntraLayerScheduler(ABC):
    """Turns what a step asks of a layer into a placement, given what is resident."""

    @abstractmethod
    def place(self, use: LayerUse, residency: Residency) -> Placement:
        """Every expert with rows in `use` is in exactly one of the placement's three sets."""


class ResidentPlacement(IntraLayerScheduler):
    """Runs every expert where it stands, which is where the whole layer stands.

    The placement names all experts of the layer instead of the chosen ones: nothing is to be moved,
    so nobody need know which were chosen, and a device is not kept waiting until the host has read
    the ids. It is the same object in every step.
    """

    def __init__(self) -> None:
        self._placements: dict[int, Placement] = {}

    def place(self, use: LayerUse, residency: Residency) -> Placement:
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


class SimulatedPlacement(IntraLayerScheduler):
    """A placement whose duration can be told beforehand, as the inter-layer scheduler needs it.

    costs: by layer. rows_per_expert, placed_us: of the layer that was placed last, over its active
    experts, and how long it takes as placed.
    layer_us(layer, num_resident, num_absent, rows): duration of a layer with so many active experts
    of either kind and that many rows each; the last few thousand answers are kept.
    """

    def __init__(self, costs: Mapping[int, CostModel]) -> None:
        self.costs = costs
        self.rows_per_expert = 1
        self.placed_us = 0.0
        self.link_price_us = 0.0
        self.kept_us: KeptUs = nothing_is_kept
        self.layer_us = lru_cache(maxsize=4096)(self._layer_us)

    def _layer_us(self, layer: int, num_resident: int, num_absent: int, rows: int) -> float:
        return self._simulate_us(self.costs[layer], (rows,) * num_resident, (rows,) * num_absent)

    @abstractmethod
    def fetch_us(self, layer: int) -> float:
        """Time to move one expert of the layer into the tier."""

    @abstractmethod
    def _simulate_us(
        self, costs: CostModel, resident: Sequence[int], absent: Sequence[int]
    ) -> float:
        """Duration of a layer placed by this scheduler; rows of each expert, falling."""

    def _split(
        self, use: LayerUse, residency: Residency
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Active experts, resident and absent, as (-rows, expert): most rows first, then number."""
        active = np.flatnonzero(use.rows)
        falling = sorted(zip((-use.rows[active]).tolist(), active.tolist(), strict=True))
        if falling:
            self.rows_per_expert = max(1, round(-sum(r for r, _ in falling) / len(falling)))
        ready = residency.ready
        resident = [entry for entry in falling if entry[1] in ready]
        absent = [entry for entry in falling if entry[1] not in ready]
        return resident, absent


class TimelinePlacement(SimulatedPlacement):
    """Device over host: fills CPU, link and device so that the layer is over first (`fill`).

    link_price_us: what a fetch must save to be worth the link, now or later; kept_us: what it saves
    later. The inter-layer scheduler sets both.
    """

    def __init__(
        self, costs: Mapping[int, CostModel], loading: Loading = nothing_is_loading
    ) -> None:
        """loading: what of a layer is on its way to the device."""
        super().__init__(costs)
        self._loading = loading

    def place(self, use: LayerUse, residency: Residency) -> Placement:
        resident, absent = self._split(use, residency)
        price_us = self._price_us(use.layer, absent)
        coming = self._loading(use.layer) if absent else {}
        loading_us = first_coming(absent, coming)
        m, k, self.placed_us = fill(
            self.costs[use.layer],
            [-rows for rows, _ in resident],
            [-rows for rows, _ in absent],
            loading_us,
            price_us,
        )
        return Placement(
            use.layer,
            on_device=tuple([e for _, e in resident[:m]]),
            fetch_first=tuple([e for _, e in absent[:k]]),
            on_cpu=tuple([e for _, e in resident[m:]] + [e for _, e in absent[k:]]),
        )

    def _price_us(self, layer: int, absent: list[tuple[int, int]]) -> float:
        """What a fetch must save now: less, as it is worth something for later. Of those with as
        many rows, what is worth most comes first."""
        if not absent:
            return self.link_price_us
        kept_us = self.kept_us(layer, [expert for _, expert in absent])
        worth_us = dict(zip(absent, kept_us, strict=True))
        absent.sort(key=lambda entry: (entry[0], -worth_us[entry], entry[1]))
        return max(0.0, self.link_price_us - max(kept_us))

    def fetch_us(self, layer: int) -> float:
        costs = self.costs[layer]
        return costs.transfer_us(costs.expert_bytes)

    def _simulate_us(
        self, costs: CostModel, resident: Sequence[int], absent: Sequence[int]
    ) -> float:
        return fill(costs, resident, absent).makespan_us


def first_coming(absent: list[tuple[int, int]], coming: Mapping[int, float]) -> list[float]:
    """Puts first what arrives first, and says how long the copies take that are under way.

    absent: (-rows, expert), most rows first, which is kept among others. coming: by expert.
    """
    if not coming:
        return []
    absent.sort(key=lambda entry: coming.get(entry[1], inf))
    return [coming[expert] for _, expert in absent if expert in coming]


class FetchOrder(SimulatedPlacement):
    """Host over disk: everything runs on the CPU, so what is left to choose is the order of reads.

    Most rows first is optimal (`run_as_fetched_us`): later arrivals find the CPU still at work.
    """

    def place(self, use: LayerUse, residency: Residency) -> Placement:
        resident, absent = self._split(use, residency)
        return Placement(
            use.layer,
            fetch_first=tuple([e for _, e in absent]),
            on_cpu=tuple([e for _, e in resident]),
        )

    def fetch_us(self, layer: int) -> float:
        costs = self.costs[layer]
        return costs.disk_us(costs.expert_bytes)

    def _simulate_us(
        self, costs: CostModel, resident: Sequence[int], absent: Sequence[int]
    ) -> float:
        busy_us = costs.cpu_start_us + sum(costs.cpu_us(rows) for rows in resident)
        fetch_us = costs.disk_us(costs.expert_bytes) if absent else 0.0
        return run_as_fetched_us(fetch_us, [costs.cpu_us(rows) for rows in absent], busy_us)
