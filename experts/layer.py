"""One step of one MoE layer, and how the layers of a model are put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.cache.expert_cache import ExpertCache, Tier, resident_cache
from moeserve.cache.policies.resident import ResidentPolicy
from moeserve.config import ExpertConfig
from moeserve.core import ConfigError, ExpertSpec, ExpertWeights
from moeserve.cpu_backend.backend import CpuBackend, Demands
from moeserve.cpu_backend.choice import BackendChoice, choose_backend
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.cpu_backend.torch_backend import TorchBackend
from moeserve.experts.device.torch_grouped import GroupedExperts
from moeserve.experts.executor import Executor
from moeserve.experts.router import Router, RouterSpec, RouterWeights
from moeserve.experts.schedule.inter_layer import InterLayerScheduler, ResidentPrefetch
from moeserve.experts.schedule.intra_layer import IntraLayerScheduler, ResidentPlacement
from moeserve.experts.weights import check_expert_weights
from moeserve.predictors.base import Predictor
from moeserve.predictors.none import NonePredictor


@dataclass(frozen=True)
class ExpertRuntime:
    """What the MoE layers of one model share. `close` ends its threads.

    native: kernels and threads of the native backend, where weights on the CPU are packed for it.
    notes: what was chosen and why, for ModelInfo.notes.
    """

    device: torch.device
    backend: CpuBackend
    native: NativeRuntime | None
    cache: ExpertCache
    intra: IntraLayerScheduler
    inter: InterLayerScheduler
    predictor: Predictor
    notes: Mapping[str, str]

    def close(self) -> None:
        self.backend.close()


def build_expert_runtime(
    config: ExpertConfig,
    specs: Mapping[int, ExpertSpec],
    device: torch.device,
    dtype: torch.dtype,
    quantized: bool = False,
) -> ExpertRuntime:
    """specs: of the experts of each MoE layer, by the layer's index in the model. dtype: of the
    model's computation. quantized: its weights are stored in 8 bits or fewer.

    On the CPU the experts stand in the host tier and run on the CPU backend; on another device they
    stand and run there. Raises ConfigError for what is not implemented or cannot run the model.
    """
    if config.policy != "resident" or config.predictor != "none":
        raise ConfigError(
            f"policy {config.policy!r} with predictor {config.predictor!r} is unknown"
        )
    num_experts = {layer: spec.num_experts for layer, spec in specs.items()}
    if device.type == "cpu":
        choice = choose_backend(config, Demands(dtype, tuple(specs.values()), quantized))
    else:
        choice = BackendChoice(TorchBackend(), f"unused, experts run on {device.type}", None)
    tier = Tier.HOST if device.type == "cpu" else Tier.DEVICE
    cache = resident_cache(tier, num_experts, ResidentPolicy())
    return ExpertRuntime(
        device=device,
        backend=choice.backend,
        native=choice.native,
        cache=cache,
        intra=ResidentPlacement(),
        inter=ResidentPrefetch(),
        predictor=NonePredictor(),
        notes={
            "cpu_backend": choice.reason,
            "experts": f"all {cache.num_slots} resident in the {tier.value} tier",
        },
    )


class MoELayer:
    """The routed experts of one layer. Shared experts are an ordinary FFN beside it."""

    def __init__(
        self, layer: int, router: Router, executor: Executor, runtime: ExpertRuntime
    ) -> None:
        self.layer = layer
        self.router = router
        self.executor = executor
        self.cache = runtime.cache
        self.intra = runtime.intra
        self.inter = runtime.inter
        self.predictor = runtime.predictor

    def forward(self, x: Tensor, step: int) -> Tensor:
        """x [T, H] to the weighted sum of each row's experts, [T, H], same dtype.

        step: number of the engine's step, for traces.
        """
        routing = self.router(x)
        placement = self.intra.place(routing, self.cache.residency(self.layer))
        with self.cache.acquire(placement) as slots:
            y = self.executor.run(x, routing, placement, slots)
        self.inter.prefetch(self.predictor.predict(self.layer, x, routing), protect=placement)
        return y


def build_moe_layer(
    layer: int,
    router_spec: RouterSpec,
    expert_spec: ExpertSpec,
    router_weights: RouterWeights,
    expert_weights: ExpertWeights | PackedExperts,
    runtime: ExpertRuntime,
) -> MoELayer:
    """One MoE layer on tensors that are on `runtime.device` already; it copies none of them.

    Raises ModelError where tensors and specs do not fit each other.
    """
    check_expert_weights(expert_spec, expert_weights, layer)
    router = Router(router_spec, router_weights)
    if runtime.cache.tier is Tier.DEVICE:
        assert isinstance(expert_weights, ExpertWeights), "packed weights are for the CPU"
        first_slot = min(runtime.cache.slots(layer).slots)
        device = GroupedExperts(expert_spec, expert_weights, first_slot)
        return MoELayer(layer, router, Executor(runtime.backend, device), runtime)
    runtime.backend.add_layer(layer, expert_spec, expert_weights)
    return MoELayer(layer, router, Executor(runtime.backend, None), runtime)
