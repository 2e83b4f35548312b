"""Experts that workers compute: what of a step goes to them, and what comes back.

Experts that a live worker holds are no business of the engine's tiers: `LocalUse` leaves them out
of what a step asks of a layer, so caches, policies and layer schedulers never see them. Whatever a
row chose and the placement does not name is a worker's. If no worker is left for it when its turn
comes, the executor has the supply bring it and computes it itself.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.cache.expert_cache import Residency
from moeserve.cache.numbering import ExpertNumbers, Numbers
from moeserve.core import LayerUse, Placement, Routing
from moeserve.cpu_backend.backend import ExpertJob
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.cpu_backend.worker_pool import WorkerPool
from moeserve.cpu_backend.worker_types import Pairs
from moeserve.experts.executor import Executor
from moeserve.experts.hybrid_executor import HybridExecutor
from moeserve.experts.layer_use import CountUse, count_use
from moeserve.experts.schedule.inter_layer import WhichBegin
from moeserve.experts.schedule.intra_layer import IntraLayerScheduler
from moeserve.experts.supply import ExpertSupply, Supplied
from moeserve.experts.watch import Watch
from moeserve.predictors.base import Prediction, Predictor


class LocalUse:
    """What a step asks of the engine's own tiers: all of it but what workers hold."""

    def __init__(self, pool: WorkerPool, count: CountUse) -> None:
        self._pool = pool
        self._count = count

    def __call__(self, layer: int, routing: Routing, num_experts: int) -> LayerUse:
        """routing's ids and weights [T, K] must be on the CPU."""
        self._pool.refresh()
        use = self._count(layer, routing, num_experts)
        here = ~self._pool.held(num_experts)
        return LayerUse(layer, use.rows * here, use.weights * here)


class UsedPlacement(IntraLayerScheduler):
    """Where all experts are resident: the engine computes those that are asked of it."""

    def place(self, use: LayerUse, residency: Residency) -> Placement:
        return Placement(use.layer, on_cpu=tuple(np.flatnonzero(use.rows).tolist()))


class LocalPredictor(Predictor):
    """A predictor that says nothing of experts that workers hold: they are not to be fetched."""

    def __init__(self, predictor: Predictor, pool: WorkerPool) -> None:
        self.name = predictor.name
        self.recent_tokens = predictor.recent_tokens
        self._predictor = predictor
        self._pool = pool

    def begin_step(self, previous_rows: NDArray[np.int64]) -> None:
        self._predictor.begin_step(previous_rows)

    def foresee(self, recent: NDArray[np.int64]) -> Prediction:
        return self._without_held(self._predictor.foresee(recent))

    def look_on(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        return self._predictor.look_on(layer, x, routing)

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        return self._without_held(self._predictor.predict(layer, x, routing))

    def _without_held(self, prediction: Prediction) -> Prediction:
        return Prediction(
            {later: self._local(chances) for later, chances in prediction.probabilities.items()}
        )

    def _local(self, chances: Tensor) -> Tensor:
        return chances.masked_fill(torch.from_numpy(self._pool.held(len(chances))), 0.0)


def not_held(pool: WorkerPool, numbers: ExpertNumbers) -> WhichBegin:
    """Those that this process computes: others gain nothing by a copy, however often they run."""

    def which(asked: Numbers) -> NDArray[np.bool_]:
        here: NDArray[np.bool_] = ~np.concatenate([pool.held(size) for size in numbers.sizes])
        return here[asked]

    return which


class RemoteExecutor:
    """One layer's expert work, a part of it at workers, the rest by this process's executor."""

    def __init__(
        self,
        backend: NativeBackend,
        local: Executor | HybridExecutor,
        pool: WorkerPool,
        supply: ExpertSupply,
        intra: IntraLayerScheduler,
        watch: Watch | None = None,
    ) -> None:
        """intra: places what no worker has given in the end."""
        self._backend = backend
        self._local = local
        self._pool = pool
        self._supply = supply
        self._intra = intra
        self._watch = watch or Watch()

    def run(self, x: Tensor, routing: Routing, placement: Placement, supplied: Supplied) -> Tensor:
        """As the local executor has it, bit for bit, whoever computes."""
        pairs = pairs_elsewhere(routing, placement)
        if not len(pairs):
            return self._local.run(x, routing, placement, supplied)
        job = ExpertJob(placement.layer, x, routing, out_dtype=x.dtype)
        parts = self._backend.in_parts(job)
        with self._pool.begin(job, pairs) as exchange:
            self._local.compute(parts, routing, placement, supplied)
            with self._watch.timeline.span("workers", layer=job.layer):
                lost = exchange.collect(parts.put)
            if lost:
                here = self._here(job, len(supplied.slots.slots), lost)
                with self._supply.acquire(here) as more:
                    self._local.compute(parts, routing, here, more)
                exchange.judge(parts.pairs)
        with self._watch.computing(job.layer, ()):
            return parts.total()

    def _here(self, job: ExpertJob, num_experts: int, lost: tuple[int, ...]) -> Placement:
        """Who of this process computes what no worker has given."""
        use = count_use(job.layer, job.routing, num_experts)
        chosen = np.zeros(num_experts, np.bool_)
        chosen[list(lost)] = True
        use = LayerUse(job.layer, use.rows * chosen, use.weights * chosen)
        return self._intra.place(use, self._supply.cache.residency(job.layer))


def pairs_elsewhere(routing: Routing, placement: Placement) -> Pairs:
    """Numbers t * K + k of what the placement does not name: row t with its k-th expert."""
    ids = routing.ids.numpy().ravel()
    named = np.zeros(max(1, int(ids.max(initial=0)) + 1), np.bool_)
    here = np.array(placement.on_device + placement.fetch_first + placement.on_cpu, np.int64)
    named[here[here < len(named)]] = True
    return np.flatnonzero(~named[ids])
