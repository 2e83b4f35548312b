"""Experts in slots of a device, the others copied or computed on the CPU; and, where host memory
has no room for all of these either, read from disk first.

What decides is the engine's own: the caches with their policies, `TimelinePlacement` or
`PlacementOverDisk`, `WatchedPrefetch` and the predictor.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.expert_cache import ExpertCache, Residency, Tier
from moeserve.cache.numbering import Numbers
from moeserve.cache.policies.registry import build_policy
from moeserve.core import ExpertKey, LayerUse, Placement
from moeserve.experts.device_supply import FittingPlacement
from moeserve.experts.prefetch import WatchedPrefetch
from moeserve.experts.schedule.inter_layer import InterLayerScheduler, whatever
from moeserve.experts.schedule.intra_layer import TimelinePlacement
from moeserve.experts.schedule.over_disk import PlacementOverDisk
from moeserve.experts.tiered_prefetch import TieredPrefetch
from moeserve.planner.plan_types import Deployment, Resource
from moeserve.planner.rates import disk_points
from moeserve.planner.simulate.experts import ExpertsClock, ExpertsTime, Rows
from moeserve.planner.simulate.foresight import Foresight
from moeserve.planner.simulate.link import SimulatedLink
from moeserve.planner.simulate.over_disk import DiskReads
from moeserve.planner.simulate.routing import SimulatedRouting
from moeserve.planner.step_costs import EngineStepCosts


class DeviceClock(ExpertsClock):
    """Device over host, or device over host over disk."""

    def __init__(
        self,
        costs: EngineStepCosts,
        routing: SimulatedRouting,
        most_rows: int,
        deployment: Deployment,
    ) -> None:
        super().__init__(costs, routing, most_rows)
        assert deployment.device_slots is not None, "there is no device to simulate"
        self._config = config = deployment.request.engine.experts
        model = self._model
        self._sizes = sizes = dict.fromkeys(self._layers, routing.num_experts)
        most = len(self._layers) * routing.num_experts
        slots = min(most, max(1, round(deployment.device_slots * routing.share)))
        self._cache = ExpertCache(
            Tier.DEVICE, sizes, slots, build_policy(config.tier_policy, sizes)
        )
        self._link = SimulatedLink(self._cache, model.transfer_us(model.expert_bytes))
        self._device_us = [0.0, *map(model.device_us, range(1, most_rows + 1))]  # by rows
        self._now_us = 0.0
        self._reads: DiskReads | None = None
        host_slots = deployment.host_slots
        if host_slots is not None and host_slots < deployment.shape.num_experts:
            in_host = max(2, round(host_slots * routing.share))
            disk = disk_points(deployment.profile)
            self._reads = DiskReads(config, sizes, in_host, model.expert_bytes, disk)
        else:
            self._fill()
        self._foresight = Foresight(config, routing, sizes)
        self._set_up_schedule()

    def _fill(self) -> None:
        for key in [
            ExpertKey(layer, e) for e in range(max(self._sizes.values())) for layer in self._sizes
        ]:
            if not self._cache.num_free:
                break
            for load in self._cache.prefetch([key]):
                self._cache.complete(load.key)

    def _set_up_schedule(self) -> None:
        """As experts/device_tier.py."""
        costs = dict.fromkeys(self._layers, self._model)
        reads, link, depth = self._reads, self._link, self._config.layers_ahead
        intra: TimelinePlacement
        if reads is None:
            intra = TimelinePlacement(costs, link.loading)
        else:
            intra = PlacementOverDisk(costs, reads.cache.residency, link.loading)
        self._placement = FittingPlacement(intra, self._cache)
        self._prefetch: InterLayerScheduler = WatchedPrefetch(
            self._cache,
            intra,
            link.begin,
            lambda: link.busy_us / 1e6,
            depth,
            self._clock_s,
            self._which_in_host,
            link.left_us,
        )
        if reads is not None and isinstance(intra, PlacementOverDisk):
            disk = reads.link
            to_host = WatchedPrefetch(
                reads.cache,
                intra.reads,
                disk.begin,
                lambda: disk.busy_us / 1e6,
                depth,
                self._clock_s,
            )
            self._prefetch = TieredPrefetch(self._prefetch, to_host, self._cache)

    def _clock_s(self) -> float:
        return self._now_us / 1e6

    def _which_in_host(self, numbers: Numbers) -> NDArray[np.bool_]:
        return whatever(numbers) if self._reads is None else self._reads.cache.which_ready(numbers)

    def _step(self, tokens: Rows, between_us: float) -> ExpertsTime:
        rows, weights = self._routing.uses(tokens)
        total = ExpertsTime()
        for layer, of_layer, weight in zip(self._layers, rows, weights, strict=True):
            self._now_us += between_us
            self._layer(LayerUse(layer, of_layer.astype(np.int32), weight), tokens, total)
        return total

    def _layer(self, use: LayerUse, tokens: Rows, total: ExpertsTime) -> None:
        layer, link, reads = use.layer, self._link, self._reads
        link.advance(self._now_us)
        if reads is not None:
            reads.link.advance(self._now_us)
        busy_us = link.busy_us
        residency = self._cache.residency(layer)
        placement = self._placement.place(use, residency)
        self._cache.observe(use)
        read_at_us = self._read(use, placement, total)
        with self._cache.acquire(placement):
            fetched = [ExpertKey(layer, e) for e in placement.fetch_first]
            there_us = [read_at_us.get(key.expert, self._now_us) for key in fetched]
            arrivals = link.demand(fetched, there_us=there_us)
            total.used[Resource.LINK] += link.busy_us - busy_us
            self._prefetch.prefetch(self._foresight.predict(layer, tokens), placement)
        took_us = self._computed_us(use, placement, arrivals, read_at_us, total)
        self._now_us += took_us
        total.us += took_us
        self._count(use, residency, total)

    def _read(self, use: LayerUse, placement: Placement, total: ExpertsTime) -> dict[int, float]:
        """Reads from disk what is in neither memory; when each expert has arrived."""
        reads = self._reads
        if reads is None:
            return {}
        slots = self._cache.slots(use.layer).slots
        asked = [e for e in placement.fetch_first if slots[e] < 0]
        asked += placement.on_cpu
        of_host = np.zeros(len(use.rows), np.bool_)
        of_host[asked] = True
        reads.cache.observe(LayerUse(use.layer, use.rows * of_host, use.weights * of_host))
        ready = reads.cache.residency(use.layer).ready
        before_us = reads.link.busy_us
        now = tuple(e for e in asked if e in ready)
        found = reads.fetch(use.layer, now, tuple(e for e in asked if e not in ready))
        total.used[Resource.DISK] += reads.link.busy_us - before_us
        return found

    def _computed_us(
        self,
        use: LayerUse,
        placement: Placement,
        arrivals: list[float],
        read_at_us: dict[int, float],
        total: ExpertsTime,
    ) -> float:
        """Until the device and the CPU are done with what the placement gives them."""
        model, rows_of = self._model, use.rows.astype(np.int64)
        rows: list[int] = rows_of.tolist()
        cpu_us = model.cpu_start_us if placement.on_cpu else 0.0
        for expert in sorted(placement.on_cpu, key=lambda e: read_at_us.get(e, 0.0)):
            cpu_us = max(cpu_us, read_at_us.get(expert, 0.0) - self._now_us)
            cpu_us += float(self._cpu_us[rows[expert]])
        device_us = self._device_us
        on_device = sum([device_us[rows[e]] for e in placement.on_device])
        fetched = [device_us[rows[e]] for e in placement.fetch_first]
        end_us = on_device + (model.device_start_us if on_device or fetched else 0.0)
        for at_us, run_us in zip(arrivals, fetched, strict=True):
            end_us = max(end_us, at_us - self._now_us) + run_us
        total.used[Resource.DEVICE_MEMORY] += on_device + sum(fetched)
        for resource, us in self._computed(rows_of[list(placement.on_cpu)]).items():
            total.used[resource] += us
        return max(cpu_us, end_us)

    @staticmethod
    def _count(use: LayerUse, residency: Residency, total: ExpertsTime) -> None:
        active = np.flatnonzero(use.rows).tolist()
        total.hits += len(residency.ready.intersection(active))
        total.asked += len(active)
