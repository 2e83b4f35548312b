"""One step of one MoE layer, and how a layer is put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from moeserve.core import ExpertSpec, ExpertWeights
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.experts.beside import Beside
from moeserve.experts.device.emulated import EmulatedDevice
from moeserve.experts.device.torch_device import TorchDevice
from moeserve.experts.device.torch_grouped import GroupedExperts
from moeserve.experts.device_executor import DeviceExecutor, HostRouting
from moeserve.experts.device_supply import DeviceSupply
from moeserve.experts.executor import Executor
from moeserve.experts.hybrid_executor import HybridExecutor
from moeserve.experts.remote import RemoteExecutor
from moeserve.experts.router import Router, RouterSpec, RouterWeights, Routes
from moeserve.experts.runtime import ExpertRuntime
from moeserve.experts.weights import check_expert_weights

AnyExecutor: TypeAlias = Executor | HybridExecutor | DeviceExecutor | RemoteExecutor


class MoELayer:
    """The routed experts of one layer. A shared expert is an ordinary FFN beside them."""

    def __init__(
        self,
        layer: int,
        router: Routes,
        executor: AnyExecutor,
        runtime: ExpertRuntime,
    ) -> None:
        self.layer = layer
        self.router = router
        self.executor = executor
        self.cache = runtime.cache
        self.supply = runtime.supply
        self.count_use = runtime.count_use
        self.intra = runtime.intra
        self.inter = runtime.inter
        self.predictor = runtime.predictor
        self.observers = runtime.observers
        self.watch = runtime.watch
        self.timeline = runtime.watch.timeline

    @property
    def is_whole(self) -> bool:
        """Whether router and experts may run in one call: nobody records the routing or forces it,
        and there is nothing to be fetched, here or for later layers."""
        watched = self.observers or not isinstance(self.router, Router)
        return not watched and self.cache.is_settled(self.layer)

    def forward(
        self, x: Tensor, step: int, shared: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """x [T, H] to the weighted sum of each row's experts, [T, H], same dtype; and to that what
        `shared` makes of x, which is computed while experts are fetched.

        step: number of the engine's step, for traces.
        """
        routing = self.router(x)
        self.timeline.lap("router", layer=self.layer)
        for observe in self.observers:
            observe(self.layer, x, routing)
        self.supply.collect()
        use = self.count_use(self.layer, routing, self.router.spec.num_experts)
        placement = self.intra.place(use, self.cache.residency(self.layer))
        self.supply.observe(use, placement)
        self.timeline.lap("place", layer=self.layer)
        with self.supply.acquire(placement) as supplied:
            self.timeline.lap("acquire", layer=self.layer)
            # Reads for later layers begin behind this layer's own, and beside its work.
            wanted = self.inter.looks_ahead(self.layer)
            ask = self.predictor.predict if wanted else self.predictor.look_on
            ahead = ask(self.layer, x, routing)
            self.inter.prefetch(ahead, protect=placement)
            self.timeline.lap("predict and prefetch", layer=self.layer)
            if shared is None:
                return self.executor.run(x, routing, placement, supplied)
            beside = Beside(shared, x, self.layer, self.timeline)
            y = self.executor.run(x, routing, placement, beside.within(supplied, placement))
            return y.add_(beside.result())


def build_moe_layer(
    layer: int,
    router_spec: RouterSpec,
    expert_spec: ExpertSpec,
    router_weights: RouterWeights,
    expert_weights: ExpertWeights | PackedExperts,
    runtime: ExpertRuntime,
) -> MoELayer:
    """One MoE layer on tensors that are on `runtime.device` already, where packed experts may be in
    host memory; it copies none of them.

    Raises ModelError where tensors and specs do not fit each other.
    """
    check_expert_weights(expert_spec, expert_weights, layer)
    router: Routes = Router(router_spec, router_weights)
    if runtime.device.type != "cpu" and isinstance(expert_weights, ExpertWeights):
        first_slot = min(runtime.cache.slots(layer).slots)
        device = GroupedExperts(expert_spec, expert_weights, first_slot)
        return MoELayer(layer, router, Executor(runtime.backend, device, runtime.watch), runtime)
    runtime.backend.add_layer(layer, expert_spec, expert_weights)
    if isinstance(expert_weights, PackedExperts):
        runtime.add_layer(layer, expert_weights)
    if isinstance(runtime.supply, DeviceSupply) and isinstance(runtime.supply.device, TorchDevice):
        router = HostRouting(router)
    return MoELayer(layer, router, _executor(runtime), runtime)


def _executor(runtime: ExpertRuntime) -> AnyExecutor:
    """Of experts on the CPU, and beside it."""
    backend, supply, watch = runtime.backend, runtime.supply, runtime.watch
    local: Executor | HybridExecutor = Executor(backend, None, watch)
    if isinstance(supply, DeviceSupply):
        assert isinstance(backend, NativeBackend), "device and CPU read the same packed records"
        if isinstance(supply.device, TorchDevice):
            return DeviceExecutor(backend, supply.device, watch)
        assert isinstance(supply.device, EmulatedDevice)
        local = HybridExecutor(backend, supply.device, watch)
    if runtime.workers is None:
        return local
    assert isinstance(backend, NativeBackend), "workers compute with native kernels"
    return RemoteExecutor(backend, local, runtime.workers, supply, runtime.intra, watch)
