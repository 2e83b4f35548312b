"""Runs a placement on a device that is there, beside the CPU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import Placement, Routing
from moeserve.cpu_backend.backend import ExpertJob, ExpertParts
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.experts.device.torch_device import TorchDevice
from moeserve.experts.router import RouterSpec, Routes
from moeserve.experts.supply import Supplied
from moeserve.experts.watch import Watch
from moeserve.predictors.base import Prediction, Predictor


class HostRouting:
    """A router on a device whose routing the host is told: it decides who computes what, so it
    waits for the device here, once in a layer."""

    def __init__(self, router: Routes) -> None:
        self._router = router

    @property
    def spec(self) -> RouterSpec:
        return self._router.spec

    def __call__(self, x: Tensor) -> Routing:
        """x [T, H] on the device; ids and weights [T, K] on the CPU."""
        routing = self._router(x)
        return Routing(routing.ids.cpu(), routing.weights.cpu())


class HostPredictor(Predictor):
    """A predictor on the host, told of hidden states on a device."""

    def __init__(self, predictor: Predictor) -> None:
        self.name = predictor.name
        self.recent_tokens = predictor.recent_tokens
        self._predictor = predictor

    def begin_step(self, previous_rows: NDArray[np.int64]) -> None:
        self._predictor.begin_step(previous_rows)

    def foresee(self, recent: NDArray[np.int64]) -> Prediction:
        return self._predictor.foresee(recent)

    def look_on(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        return self._predictor.look_on(layer, self._rows(x), routing)

    def predict(self, layer: int, x: Tensor, routing: Routing) -> Prediction:
        return self._predictor.predict(layer, self._rows(x), routing)

    def _rows(self, x: Tensor) -> Tensor:
        return x.cpu() if self._predictor.reads_rows else x


class DeviceExecutor:
    """One layer's expert work on a device and the CPU.

    Of every group the device is given its share first, and computes it beside the CPU's. Each side
    adds its experts up in float32, in the order of a row's routing; then both are added and rounded
    once. So results differ with the placement by float32's rounding of that sum, and by what the
    arithmetic of both sides differs.
    """

    def __init__(self, backend: NativeBackend, device: TorchDevice, watch: Watch) -> None:
        self._backend = backend
        self._device = device
        self._watch = watch

    def run(self, x: Tensor, routing: Routing, placement: Placement, supplied: Supplied) -> Tensor:
        """x [T, H] on the device, routing on the CPU, to the weighted sum of each row's experts,
        [T, H] in the dtype of x, on the device."""
        layer = placement.layer
        work = self._device.begin(layer, x, routing)
        on_cpu = frozenset(placement.on_cpu)
        # Brought before the device gets its share, behind which a copy would wait.
        here_x = x.cpu() if on_cpu else x
        parts: ExpertParts | None = None
        for group in supplied.groups:
            here = [e for e in group if e in on_cpu]
            work.submit([e for e in group if e not in on_cpu], supplied.slots)
            if here:
                if parts is None:
                    parts = self._backend.in_parts(ExpertJob(layer, here_x, routing))
                with self._watch.computing(layer, here):
                    parts.add(here)
        total = work.total()
        if parts is not None:
            total += parts.total().to(total.device)
        return total.to(x.dtype)
