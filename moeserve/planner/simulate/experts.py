"""How long the routed experts of a step take, by where they stand.

What decides is the engine's own: `ExpertCache` with its policy, `FetchOrder` over the disk,
`TimelinePlacement` on a device. Only reading, copying and computing are replaced by their costs.
Simulated are the layers that the routing has; the others count as these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.expert_cache import ExpertCache, Tier
from moeserve.cache.policies.registry import build_policy
from moeserve.core import ExpertKey, LayerUse, Placement
from moeserve.engine.batch import ScheduledBatch, ScheduledChunk
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.intra_layer import FetchOrder, TimelinePlacement
from moeserve.experts.schedule.profile import DiskPoint
from moeserve.planner.plan_types import Deployment, Resource
from moeserve.planner.simulate.busy import split_work
from moeserve.planner.simulate.routing import SimulatedRouting
from moeserve.planner.step_costs import MANY_ROWS, EngineStepCosts

Rows = NDArray[np.int64]
Weights = NDArray[np.float32]
#: what the disk tier reads at a time (experts/disk_tier.py), and the most threads that it tries
CHUNK_BYTES = 1 << 20


@dataclass
class ExpertsTime:
    """Of all MoE layers in one step."""

    us: float = 0.0
    used: dict[Resource, float] = field(default_factory=lambda: defaultdict(float))
    hits: int = 0
    asked: int = 0

    def scaled(self, factor: float) -> ExpertsTime:
        used = {resource: us * factor for resource, us in self.used.items()}
        return ExpertsTime(self.us * factor, used, self.hits, self.asked)


class ExpertsClock(ABC):
    """What all have in common: costs as tables, so that a step of many layers is a few sums."""

    def __init__(self, costs: EngineStepCosts, routing: SimulatedRouting, most_rows: int) -> None:
        self.first_request = 0  # of the routing's that the simulation's first one is like
        self._costs = costs
        self._routing = routing
        self._layers = list(routing.layers)
        self._model: CostModel = costs.expert_costs(self._layers[0])
        counts = range(most_rows + 1)
        floor, slope = self._model.cpu[1], self._model.cpu[MANY_ROWS] / MANY_ROWS
        self._cpu_us = np.array([0.0] + [self._model.cpu[count] for count in counts[1:]])
        work = [split_work(self._cpu_us[n], floor, slope * n) for n in counts]
        work[0] = split_work(0.0, 0.0, 0.0)
        self._memory_us = np.array([each[Resource.CPU_MEMORY] for each in work])
        self._compute_us = np.array([each[Resource.CPU_COMPUTE] for each in work])

    def step(self, batch: ScheduledBatch) -> ExpertsTime:
        """Of all MoE layers."""
        tokens = np.concatenate([self._tokens(chunk) for chunk in batch.chunks])
        rows, weights = self._routing.uses(tokens)
        return self._step(rows, weights, len(tokens)).scaled(1 / self._routing.share)

    def _tokens(self, chunk: ScheduledChunk) -> NDArray[np.int64]:
        """Those of the routing that stand for the chunk's."""
        sequence = chunk.sequence
        return self._routing.places(
            self.first_request + int(sequence.request_id),
            np.arange(chunk.start, chunk.stop),
            sequence.num_prompt_tokens,
            sequence.request.params.max_tokens,
        )

    @abstractmethod
    def _step(self, rows: Rows, weights: Weights, num_rows: int) -> ExpertsTime:
        """rows, weights: [L, E] of the simulated layers."""

    def _computed(self, rows: Rows) -> dict[Resource, float]:
        return {
            Resource.CPU_MEMORY: float(self._memory_us[rows].sum()),
            Resource.CPU_COMPUTE: float(self._compute_us[rows].sum()),
        }


class ResidentClock(ExpertsClock):
    """All experts in memory: a layer is one job."""

    def _step(self, rows: Rows, weights: Weights, num_rows: int) -> ExpertsTime:
        us = len(rows) * self._model.cpu_start_us + float(self._cpu_us[rows].sum())
        return ExpertsTime(us, self._computed(rows))


class DiskClock(ExpertsClock):
    """Experts in slots of host memory, the others read as they are wanted."""

    def __init__(
        self,
        costs: EngineStepCosts,
        routing: SimulatedRouting,
        most_rows: int,
        deployment: Deployment,
    ) -> None:
        super().__init__(costs, routing, most_rows)
        assert deployment.host_slots is not None, "there are no slots to simulate"
        experts = deployment.request.engine.experts
        sizes = dict.fromkeys(self._layers, routing.num_experts)
        slots = max(2, round(deployment.host_slots * routing.share))
        self._cache = ExpertCache(Tier.HOST, sizes, slots, build_policy(experts.tier_policy, sizes))
        self._order = FetchOrder(dict.fromkeys(self._layers, self._model))
        self._disk = deployment.profile.disk
        self._threads = experts.disk_threads

    def _step(self, rows: Rows, weights: Weights, num_rows: int) -> ExpertsTime:
        total = ExpertsTime(used=defaultdict(float, self._computed(rows)))
        for layer, of_layer, weight in zip(self._layers, rows, weights, strict=True):
            self._layer(LayerUse(layer, of_layer.astype(np.int32), weight), num_rows, total)
        return total

    def _layer(self, use: LayerUse, num_rows: int, total: ExpertsTime) -> None:
        layer, rows = use.layer, use.rows.astype(np.int64)
        self._cache.observe(use)
        placement = self._order.place(use, self._cache.residency(layer))
        self._fetch(placement)
        now = [int(rows[e]) for e in placement.on_cpu]
        fetched = [int(rows[e]) for e in placement.fetch_first]
        read_us = read_time_us(self._disk, self._model.expert_bytes, len(fetched), self._threads)
        busy_us, num_groups = self._beside_reading(now, fetched, read_us)
        books_us = self._costs.tier_us(layer, len(now) + len(fetched), len(fetched))
        books_us += self._costs.parts_us(layer, num_rows, num_groups + bool(fetched))
        total.us += busy_us + books_us
        total.used[Resource.DISK] += read_us
        total.used[Resource.OVERHEAD] += books_us
        total.hits += len(now)
        total.asked += len(now) + len(fetched)

    def _fetch(self, placement: Placement) -> None:
        """In waves, as `DiskSupply` does where a layer wants more than there are slots."""
        now, rest = placement.on_cpu, placement.fetch_first
        while now or rest:
            kept = Placement(placement.layer, on_cpu=now)
            count = self._cache.num_obtainable(kept)
            wave = Placement(placement.layer, fetch_first=rest[:count], on_cpu=now)
            with self._cache.acquire(wave) as slots:
                for load in slots.loads:
                    self._cache.complete(ExpertKey(*load.key))
            now, rest = (), rest[count:]

    def _beside_reading(
        self, now: Sequence[int], fetched: Sequence[int], read_us: float
    ) -> tuple[float, int]:
        """Until all are computed, and in how many runs: what has arrived meanwhile is one run."""
        start_us = self._model.cpu_start_us
        us = start_us + float(self._cpu_us[list(now)].sum()) if now else 0.0
        num_groups = int(bool(now))
        arrivals = read_us * np.arange(1, len(fetched) + 1) / max(len(fetched), 1)
        done = 0
        while done < len(fetched):
            us = max(us, float(arrivals[done]))
            here = max(done + 1, int(np.searchsorted(arrivals, us, side="right")))
            us += start_us + float(self._cpu_us[list(fetched[done:here])].sum())
            num_groups += 1
            done = here
        return us, num_groups


class DeviceClock(ExpertsClock):
    """Experts in slots of a device, the others copied or computed on the CPU."""

    def __init__(
        self,
        costs: EngineStepCosts,
        routing: SimulatedRouting,
        most_rows: int,
        deployment: Deployment,
    ) -> None:
        super().__init__(costs, routing, most_rows)
        assert deployment.device_slots is not None, "there is no device to simulate"
        experts = deployment.request.engine.experts
        sizes = dict.fromkeys(self._layers, routing.num_experts)
        most = len(self._layers) * routing.num_experts
        slots = min(most, max(1, round(deployment.device_slots * routing.share)))
        self._cache = ExpertCache(
            Tier.DEVICE, sizes, slots, build_policy(experts.tier_policy, sizes)
        )
        self._placement = TimelinePlacement(dict.fromkeys(self._layers, self._model))
        for key in [ExpertKey(layer, e) for e in range(routing.num_experts) for layer in sizes]:
            if not self._cache.num_free:
                break
            for load in self._cache.prefetch([key]):
                self._cache.complete(load.key)

    def _step(self, rows: Rows, weights: Weights, num_rows: int) -> ExpertsTime:
        total = ExpertsTime()
        for layer, of_layer, weight in zip(self._layers, rows, weights, strict=True):
            self._layer(LayerUse(layer, of_layer.astype(np.int32), weight), total)
        return total

    def _layer(self, use: LayerUse, total: ExpertsTime) -> None:
        model, layer, rows = self._model, use.layer, use.rows.astype(np.int64)
        self._cache.observe(use)
        residency = self._cache.residency(layer)
        placement = self._placement.place(use, residency)
        with self._cache.acquire(placement) as slots:
            for load in slots.loads:
                self._cache.complete(ExpertKey(*load.key))
        on_cpu = rows[list(placement.on_cpu)]
        on_device = [int(rows[e]) for e in placement.on_device]
        fetched = [int(rows[e]) for e in placement.fetch_first]
        cpu_us = float(self._cpu_us[on_cpu].sum()) + (model.cpu_start_us if len(on_cpu) else 0.0)
        device_us = sum(model.device_us(n) for n in on_device + fetched)
        link_us = len(fetched) * model.transfer_us(model.expert_bytes) if fetched else 0.0
        end_us = model.device_start_us if on_device or fetched else 0.0
        end_us += sum(model.device_us(n) for n in on_device)
        for rank, n in enumerate(fetched, start=1):
            end_us = max(end_us, link_us * rank / len(fetched)) + model.device_us(n)
        total.us += max(cpu_us, end_us)
        total.used[Resource.LINK] += link_us
        total.used[Resource.DEVICE_MEMORY] += device_us
        for resource, us in self._computed(on_cpu).items():
            total.used[resource] += us
        total.hits += len(residency.ready.intersection(np.flatnonzero(rows).tolist()))
        total.asked += int(np.count_nonzero(rows))


def read_time_us(
    points: Sequence[DiskPoint], record_bytes: int, count: int, threads: int | None
) -> float:
    """Of so many records together: chunk by chunk, by as many threads as there are chunks for.

    threads: that read; None: as many as read fastest. 0 where nothing is to be read.
    """
    if not count:
        return 0.0
    chunk = min(record_bytes, CHUNK_BYTES)
    num_chunks = count * -(-record_bytes // chunk)
    blocks = sorted({point.block_bytes for point in points})
    nearest = min(blocks, key=lambda block: max(block / chunk, chunk / block))
    rates = {p.queue_depth: p.bytes_per_s.value for p in points if p.block_bytes == nearest}
    depths = sorted(rates)
    best = threads or max(depths, key=rates.__getitem__)
    depth = min(num_chunks, best)
    rate = float(np.interp(depth, depths, [rates[each] for each in depths]))
    return count * record_bytes / rate * 1e6
