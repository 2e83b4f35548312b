"""Within one layer and step, where experts come from disk through host memory to the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moeserve.cache.expert_cache import Residency
from moeserve.core import LayerUse, Placement
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.disk_fill import Active, DiskFill, fill_from_disk
from moeserve.experts.schedule.intra_layer import (
    FetchOrder,
    Loading,
    TimelinePlacement,
    first_coming,
    nothing_is_loading,
)
from moeserve.experts.schedule.timeline import fill


class PlacementOverDisk(TimelinePlacement):
    """Device over host over disk: fills CPU, link, device and disk so that the layer is over first.

    What is in neither memory is read before it can be copied or computed, so it may be in
    `fetch_first` or in `on_cpu`; the order of reads is that of the placement, `fetch_first` first.

    reads: what this says of the time that reads save, for who begins them ahead of time.
    """

    def __init__(
        self,
        costs: Mapping[int, CostModel],
        host: Callable[[int], Residency],
        loading: Loading = nothing_is_loading,
    ) -> None:
        """host: what of a layer is ready in host memory. loading: on its way to the device."""
        super().__init__(costs, loading)
        self._host = host
        self.reads = ReadsBelowDevice(costs)

    def place(self, use: LayerUse, residency: Residency) -> Placement:
        in_host = self._host(use.layer).ready
        resident, absent = self._split(use, residency)
        price_us = self._price_us(use.layer, absent)
        self.reads.rows_per_expert = self.rows_per_expert
        coming = self._loading(use.layer) if absent else {}
        staying = [entry for entry in resident if entry[1] not in in_host]
        movable = [entry for entry in resident if entry[1] in in_host]
        to_fetch = [entry for entry in absent if entry[1] in in_host]
        to_read = [entry for entry in absent if entry[1] not in in_host]
        loading_us = first_coming(to_fetch, coming)
        active = Active(
            on_device=_rows(movable),
            on_device_only=_rows(staying),
            in_host=_rows(to_fetch),
            on_disk=_rows(to_read),
            loading_us=loading_us,
        )
        m, k, x, self.placed_us = self._fill(self.costs[use.layer], active, price_us)
        return Placement(
            use.layer,
            on_device=_experts(staying + movable[:m]),
            fetch_first=_experts(to_fetch[:k] + to_read[:x]),
            on_cpu=_experts(movable[m:] + to_fetch[k:] + to_read[x:]),
        )

    def _fill(self, costs: CostModel, active: Active, price_us: float) -> DiskFill:
        if active.on_disk:
            return fill_from_disk(costs, active, price_us)
        # The same, in a tenth of the time: in most layers nothing has to be read.
        m, k, us = fill(
            costs,
            active.on_device,
            active.in_host,
            active.loading_us,
            price_us,
            active.on_device_only,
        )
        return DiskFill(m, k, 0, us)


class ReadsBelowDevice(FetchOrder):
    """Host over disk, for experts that do not stand on the device: they can be run by the CPU, or
    copied there once they have been read."""

    def _simulate_us(
        self, costs: CostModel, resident: Sequence[int], absent: Sequence[int]
    ) -> float:
        return fill_from_disk(costs, Active(in_host=resident, on_disk=absent)).makespan_us


def _rows(entries: Sequence[tuple[int, int]]) -> list[int]:
    return [-rows for rows, _ in entries]


def _experts(entries: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple([expert for _, expert in entries])
