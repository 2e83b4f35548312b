"""What the MoE layers of one model share: backend, cache, supply, schedulers, predictor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moeserve.cache.expert_cache import ExpertCache
from moeserve.config import ExpertConfig
from moeserve.core import ConfigError, Placement, Routing
from moeserve.cpu_backend.backend import CpuBackend
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.cpu_backend.worker_pool import WorkerPool
from moeserve.experts.device_executor import HostPredictor
from moeserve.experts.device_tier import DeviceTier, build_device_tier
from moeserve.experts.disk_supply import DiskSupply
from moeserve.experts.disk_tier import DiskTier
from moeserve.experts.layer_use import CountUse, count_use
from moeserve.experts.native_predictors import native_implementations
from moeserve.experts.prefetch import WatchedPrefetch
from moeserve.experts.remote import LocalPredictor, LocalUse, UsedPlacement
from moeserve.experts.schedule.inter_layer import InterLayerScheduler
from moeserve.experts.schedule.intra_layer import (
    IntraLayerScheduler,
    SimulatedPlacement,
)
from moeserve.experts.supply import ExpertSupply, ResidentSupply
from moeserve.experts.torch_tier import build_torch_tier
from moeserve.experts.watch import Watch
from moeserve.predictors.base import Predictor
from moeserve.predictors.gates import LayerGate
from moeserve.predictors.registry import PLAIN, TRAINED_FILES, make_predictor
from moeserve.stats import ExpertStats
from moeserve.worker_messages import WorkerIdentity

#: told (layer, x [T, H], routing) of every layer that runs
Observer = Callable[[int, torch.Tensor, Routing], None]


@dataclass(frozen=True)
class ExpertRuntime:
    """`close` ends its threads.

    native: kernels and threads of the native backend, where weights on the CPU are packed for it.
    observers: called by every layer with what it is asked; to be appended to by recorders.
    watch: how long experts are computed, and the timeline of a step.
    count_use: (layer, routing, number of experts) to what schedulers and policies look at.
    workers: processes that compute some of the experts; None where none are named.
    disk: the host tier over the disk, which is `supply` or stands below it; None where all experts
    are in memory.
    notes: what was chosen and why, for ModelInfo.notes.
    """

    config: ExpertConfig
    device: torch.device
    backend: CpuBackend
    native: NativeRuntime | None
    cache: ExpertCache
    supply: ExpertSupply
    intra: IntraLayerScheduler
    inter: InterLayerScheduler
    predictor: Predictor
    count_use: CountUse
    notes: dict[str, str]
    observers: list[Observer] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    workers: WorkerPool | None = None
    disk: DiskTier | None = None

    def with_predictor(
        self,
        read_gates: Callable[[], Sequence[LayerGate]],
        folder: Path,
        config_sha256: Callable[[], str],
    ) -> ExpertRuntime:
        """The runtime with the predictor that its config names. read_gates: of all MoE layers.
        folder: of the model, where what was trained for it is, unless the config names a file.
        config_sha256: of the model's config.json, which the file must be for.

        Raises ModelError for a model that the predictor cannot serve, ConfigError for a trained
        file that is missing, broken or of another model.
        """
        if self.config.predictor == "none":
            return self
        gates = read_gates()
        num_experts = {gate.layer: gate.num_experts for gate in gates}
        name, depth = self.config.predictor, self.config.layers_ahead
        beside = folder / TRAINED_FILES[name] if name in TRAINED_FILES else None
        predictor = make_predictor(
            name,
            num_experts,
            depth,
            gates,
            self.config.predictor_file or beside,
            config_sha256(),
            PLAIN if self.native is None else native_implementations(self.native),
        )
        if self.disk is not None:
            predictor.put_off = self.disk.supply.chores.put_off
        if self.workers is not None:
            predictor = LocalPredictor(predictor, self.workers)
        self.notes["predictor"] = f"{name}, {depth} layers ahead at most"
        inter = self.inter
        if isinstance(self.supply, DiskSupply) and isinstance(self.intra, SimulatedPlacement):
            supply = self.supply
            inter = WatchedPrefetch(
                self.cache, self.intra, supply.begin_prefetch, supply.busy_s, depth
            )
        return replace(self, predictor=predictor, inter=inter)

    def begin_step(
        self,
        previous_rows: NDArray[np.int64],
        recent_tokens: Callable[[int], NDArray[np.int64]],
    ) -> None:
        """Tells the predictor of a step that is about to run, and prefetches what it foresees.

        previous_rows: as `Predictor.begin_step`. recent_tokens: so many last tokens of every row.
        """
        predictor = self.predictor
        predictor.begin_step(previous_rows)
        if not predictor.recent_tokens:
            return
        # As if said in the last layer of the step before, whose experts nobody needs now.
        last = self.cache.numbers.layers[-1]
        if self.inter.looks_ahead(last):
            foreseen = predictor.foresee(recent_tokens(predictor.recent_tokens))
            if foreseen.probabilities:
                self.supply.collect()
                self.inter.prefetch(foreseen, Placement(last))

    def with_device(
        self, layers: Mapping[int, PackedExperts], rest_bytes: int, shared_bytes: int
    ) -> ExpertRuntime:
        """The runtime with an emulated device over host memory, and over the disk where experts
        stay there, as its config has it.

        layers: the experts of each MoE layer. rest_bytes: all other weights;
        shared_bytes: the shared experts among them. Raises ConfigError.
        """
        assert self.native is not None, "an emulated device computes with the native kernels"
        tier = build_device_tier(
            self.config,
            layers,
            self.native,
            rest_bytes,
            shared_bytes,
            self.watch,
            self.disk,
            self.workers,
        )
        return self._over(tier)

    def beside(
        self, layers: Mapping[int, PackedExperts], device: torch.device, dtype: torch.dtype
    ) -> ExpertRuntime:
        """The runtime with slots on a device that torch has, over host memory and maybe the disk.

        layers, dtype: as of `build_torch_tier`. Raises ConfigError.
        """
        assert self.native is not None, "what the device has no slot for runs on native kernels"
        tier = build_torch_tier(
            self.config, layers, self.native, device, dtype, self.watch, self.disk
        )
        return self._over(tier)

    def on(self, device: torch.device) -> ExpertRuntime:
        """The runtime for layers whose rows are on a device, with all weights but those of experts.

        The predictor stays on the host, where routing is known.
        """
        return replace(self, device=device, native=None, predictor=HostPredictor(self.predictor))

    def with_workers(self, identity: WorkerIdentity) -> ExpertRuntime:
        """The runtime with the workers that its config names, all of which are there; as it is
        where there are none. Raises ConfigError."""
        if not self.config.workers:
            return self
        pool = WorkerPool(self.config, identity, max(self.cache.numbers.sizes))
        try:
            pool.start()
        except ConfigError:
            pool.close()
            raise
        self.notes["workers"] = pool.describe()
        resident = isinstance(self.supply, ResidentSupply)
        intra = UsedPlacement() if resident else self.intra
        return replace(self, workers=pool, count_use=LocalUse(pool, count_use), intra=intra)

    def add_layer(self, layer: int, experts: PackedExperts) -> None:
        """Where experts stay on disk: their records are put into slots from now on."""
        if self.disk is not None:
            self.disk.supply.add_layer(layer, experts)

    @property
    def host_slot_bytes(self) -> int | None:
        """Of a slot of the host tier over the disk; None where all experts are resident."""
        return None if self.disk is None else self.disk.supply.slots.slot_bytes

    @property
    def num_experts(self) -> int:
        """Of all MoE layers together."""
        return self.cache.numbers.total

    @property
    def num_misses(self) -> int:
        """Uses of experts that had no slot in memory, so far."""
        cache = self.cache if self.disk is None else self.disk.cache
        return int(cache.counters.misses.sum())

    def settle_host_memory(self) -> None:
        """Waits until the memory is free that a smaller budget took away; between two steps."""
        if self.disk is not None:
            self.disk.supply.settle()

    def reserve_host_memory(self, num_bytes: int) -> None:
        """Addresses for the slots that a host tier of so many bytes has. They are memory only when
        experts are read into them.

        Raises MemoryError where the system has none.
        """
        assert self.disk is not None, "all experts are resident"
        self.disk.supply.slots.grow(self._host_slots(num_bytes))

    def resize_host_memory(self, num_bytes: int) -> None:
        """Makes the host tier as large as so many bytes allow; may be called between two steps.

        Raises CacheError where they are too few for two experts; MemoryError where the system has
        no such memory, unless it was reserved.
        """
        assert self.disk is not None, "all experts are resident"
        self.disk.supply.resize(self._host_slots(num_bytes))
        self.notes["experts"] = self.disk.slots_in_words

    @property
    def trouble(self) -> str | None:
        """Why some expert's record cannot be read from disk; None where all that were asked for
        can."""
        error = None if self.disk is None else self.disk.supply.trouble
        return None if error is None else str(error)

    def retry_failed_reads(self, most_s: float) -> None:
        """Looks whether records can be read again; between two steps."""
        if self.disk is not None:
            self.disk.supply.retry_failed(most_s)

    def stats(self) -> ExpertStats:
        """What caches, transfers and experts have done so far."""
        caches, links = self.supply.stats()
        numbers = self.cache.numbers
        device_s = self.watch.device_s
        return ExpertStats(
            layers=list(numbers.layers),
            num_experts=list(numbers.sizes),
            cpu_busy_s=[self.watch.cpu_s[layer] for layer in numbers.layers],
            device_busy_s=[device_s[layer] for layer in numbers.layers] if device_s else None,
            caches=caches,
            links=links,
            pool=None if self.workers is None else self.workers.stats(),
        )

    def check_integrity(self) -> None:
        """AssertionError where the books of what stands where do not agree."""
        self.supply.check_integrity()
        if self.workers is not None:
            self.workers.check_integrity()

    def close(self) -> None:
        self.supply.close()
        self.backend.close()
        if self.workers is not None:
            self.workers.close()

    def _over(self, tier: DeviceTier) -> ExpertRuntime:
        """The runtime with a device tier over what it has."""
        return replace(
            self,
            cache=tier.cache,
            supply=tier.supply,
            intra=tier.intra,
            inter=tier.inter,
            count_use=count_use if self.workers is None else self.count_use,
            notes=self.notes | tier.notes,
        )

    def _host_slots(self, num_bytes: int) -> int:
        assert self.host_slot_bytes is not None
        return min(num_bytes // self.host_slot_bytes, self.num_experts)
