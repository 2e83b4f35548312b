"""Experts in slots of host memory, the others on disk: read as they are wanted, or ahead.

What decides is the engine's own: `ExpertCache` with its policy, `FetchOrder`, `WatchedPrefetch` and
the predictor. Only reading and computing are replaced by their costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from moeserve.cache.expert_cache import ExpertCache, Tier
from moeserve.cache.policies.registry import build_policy
from moeserve.cache.types import ExpertState
from moeserve.config import ExpertConfig
from moeserve.core import ExpertKey, LayerUse, Placement
from moeserve.experts.prefetch import WatchedPrefetch
from moeserve.experts.schedule.intra_layer import FetchOrder
from moeserve.experts.schedule.profile import DiskPoint
from moeserve.planner.disk_times import read_time_us
from moeserve.planner.plan_types import Deployment, Resource
from moeserve.planner.rates import disk_points
from moeserve.planner.simulate.experts import ExpertsClock, ExpertsTime, Rows
from moeserve.planner.simulate.foresight import Foresight
from moeserve.planner.simulate.link import SimulatedLink
from moeserve.planner.simulate.routing import SimulatedRouting
from moeserve.planner.step_costs import EngineStepCosts, Work


class DiskReads:
    """A host tier that reads what it lacks, wave by wave where a layer wants more than there are
    slots (experts/disk_supply.py)."""

    def __init__(
        self, config: ExpertConfig, sizes: dict[int, int], slots: int, record_bytes: int,
        disk: Sequence[DiskPoint],
    ) -> None:  # fmt: skip
        self.cache = ExpertCache(Tier.HOST, sizes, slots, build_policy(config.tier_policy, sizes))
        self._record_bytes = record_bytes
        self._disk = disk
        self._threads = config.disk_threads
        self.link = SimulatedLink(self.cache, self.read_us(slots) / slots)

    def read_us(self, count: int) -> float:
        return read_time_us(self._disk, self._record_bytes, count, self._threads)

    def fetch(
        self, layer: int, now: tuple[int, ...], wanted: tuple[int, ...], from_us: float = 0.0,
        reading_us: float | None = None,
    ) -> dict[int, float]:  # fmt: skip
        """When each wanted expert has arrived. now: those that are computed meanwhile. from_us:
        before which nothing can be read. reading_us: of all together; None: as if nothing else went
        on."""
        arrivals: dict[int, float] = {}
        if reading_us is None:
            reading_us = self.read_us(len(wanted))
        each_us = reading_us / len(wanted) if wanted else 0.0
        rest = wanted
        while now or rest:
            fetched, rest = self._split(layer, now, rest)
            with self.cache.acquire(Placement(layer, fetch_first=fetched, on_cpu=now)):
                keys = [ExpertKey(layer, expert) for expert in fetched]
                there_us = [from_us] * len(keys)
                arrivals |= zip(fetched, self.link.demand(keys, each_us, there_us), strict=True)
            now = ()
        return arrivals

    def _split(
        self, layer: int, now: tuple[int, ...], rest: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What can have a slot beside `now`, and what must wait."""
        absent_state = ExpertState.ABSENT
        coming = tuple(e for e in rest if self.cache.state(ExpertKey(layer, e)) is not absent_state)
        absent = tuple(e for e in rest if e not in coming)
        kept = Placement(layer, fetch_first=coming, on_cpu=now)
        if self.cache.num_obtainable(kept) < len(absent):
            self.link.cancel()
            coming = tuple(e for e in coming if self._is_moving(layer, e))
            absent = tuple(e for e in rest if e not in coming)
            kept = Placement(layer, fetch_first=coming, on_cpu=now)
        if not (now or coming or self.cache.num_obtainable(kept)):
            self.link.finish()
        count = self.cache.num_obtainable(kept)
        return coming + absent[:count], absent[count:]

    def _is_moving(self, layer: int, expert: int) -> bool:
        return expert in self.link.loading(layer)


class DiskClock(ExpertsClock):
    """Host over disk."""

    def __init__(
        self,
        costs: EngineStepCosts,
        routing: SimulatedRouting,
        most_rows: int,
        deployment: Deployment,
    ) -> None:
        super().__init__(costs, routing, most_rows)
        assert deployment.host_slots is not None, "there are no slots to simulate"
        config = deployment.request.engine.experts
        sizes = dict.fromkeys(self._layers, routing.num_experts)
        slots = max(2, round(deployment.host_slots * routing.share))
        expert_bytes, disk = self._model.expert_bytes, disk_points(deployment.profile)
        self._reads = DiskReads(config, sizes, slots, expert_bytes, disk)
        self._cache = self._reads.cache
        self._order = FetchOrder(dict.fromkeys(self._layers, self._model))
        self._tier = costs.engine.tier
        self._hidden_size = costs.model.hidden_size
        self._shared: dict[tuple[int, int], Work] = {}  # of a layer, by rows
        self._now_us = 0.0
        self._foresight: Foresight | None = None
        if config.predictor != "none":
            self._foresight = Foresight(config, routing, sizes)
            link = self._reads.link
            self._prefetch = WatchedPrefetch(
                self._cache,
                self._order,
                link.begin,
                lambda: link.busy_us / 1e6,
                config.layers_ahead,
                lambda: self._now_us / 1e6,
            )

    def _step(self, tokens: Rows, between_us: float) -> ExpertsTime:
        rows, weights = self._routing.uses(tokens)
        total = ExpertsTime(used=defaultdict(float, self._computed(rows)))
        for layer, of_layer, weight in zip(self._layers, rows, weights, strict=True):
            self._now_us += between_us
            self._layer(LayerUse(layer, of_layer.astype(np.int32), weight), tokens, total)
        return total

    def _layer(self, use: LayerUse, tokens: Rows, total: ExpertsTime) -> None:
        layer, rows, link = use.layer, use.rows.astype(np.int64), self._reads.link
        link.advance(self._now_us)
        before_us = link.busy_us
        self._cache.observe(use)
        placement = self._order.place(use, self._cache.residency(layer))
        wanted = placement.fetch_first
        from_us = self._now_us + self._tier.to_read_us(len(wanted))
        shared = self._shared_work(layer, len(tokens))
        computing_us = shared.us + float(self._cpu_us[rows[[*placement.on_cpu, *wanted]]].sum())
        reading_us = self._tier.reading_us(self._reads.read_us(len(wanted)), computing_us)
        arrivals = self._reads.fetch(layer, placement.on_cpu, wanted, from_us, reading_us)
        read_us = link.busy_us - before_us
        if self._foresight is not None:
            self._prefetch.prefetch(self._foresight.predict(layer, tokens), placement)
        order = sorted(arrivals, key=arrivals.__getitem__)
        now = [int(rows[e]) for e in placement.on_cpu]
        begin_us = self._tier.begin_us(len(tokens), len(order))
        busy_us, own_us, num_runs = self._beside_reading(
            begin_us,
            now,
            shared.us,
            [int(rows[e]) for e in order],
            np.array([arrivals[e] - self._now_us for e in order]),
        )
        books_us = self._tier.books_us(len(tokens), len(order), num_runs)
        self._now_us += busy_us + books_us
        total.us += busy_us + books_us
        for resource, us in shared.used.items():
            total.used[resource] += us
        total.used[Resource.DISK] += read_us
        total.used[Resource.OVERHEAD] += books_us + own_us
        total.hits += len(now)
        total.asked += len(now) + len(order)

    def _shared_work(self, layer: int, num_rows: int) -> Work:
        found = self._shared.get((layer, num_rows))
        if found is None:
            found = self._shared[layer, num_rows] = self._costs.beside_work(layer, num_rows)
        return found

    def _beside_reading(
        self, begin_us: float, now: Sequence[int], shared_us: float, fetched: Sequence[int],
        arrivals: np.ndarray,
    ) -> tuple[float, float, int]:  # fmt: skip
        """Until all are computed, what of that the engine adds, and in how many runs: what has
        arrived meanwhile is one, and their sum is the last.

        begin_us: before the first run. now, fetched: rows of each expert. shared_us: of the shared
        expert, computed before any of the fetched is waited for. arrivals: of the fetched, rising.
        """
        tier, reads_end_us = self._tier, float(arrivals[-1]) if fetched else 0.0
        us = own_us = begin_us
        num_runs = done = 0

        def run(rows: Sequence[int]) -> None:
            nonlocal us, own_us, num_runs
            products_us = self._model.cpu_start_us + float(self._cpu_us[list(rows)].sum())
            numbers = sum(rows) * self._hidden_size if fetched else 0
            run_us = tier.run_us(products_us, numbers, reads_end_us - us)
            us += run_us
            own_us += run_us - products_us
            num_runs += 1

        if now:
            run(now)
        if shared_us:
            run_us = tier.beside_us(shared_us, reads_end_us - us)
            us, own_us = us + run_us, own_us + run_us - shared_us
        while done < len(fetched):
            if arrivals[done] > us:
                us = float(arrivals[done]) + tier.late_us
            here = max(done + 1, int(np.searchsorted(arrivals, us, side="right")))
            run(fetched[done:here])
            done = here
        if fetched:
            sum_us = float(tier.runs[0])
            us, own_us, num_runs = us + sum_us, own_us + sum_us, num_runs + 1
        return us, own_us, num_runs
