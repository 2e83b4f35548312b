"""Runs a placement on the CPU and on a device at once."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from moeserve.core import Placement, Routing
from moeserve.cpu_backend.backend import ExpertJob
from moeserve.cpu_backend.native_backend import NativeBackend
from moeserve.cpu_backend.native_parts import NativeParts
from moeserve.experts.device.emulated import EmulatedDevice
from moeserve.experts.supply import Supplied
from moeserve.experts.watch import Watch


class HybridExecutor:
    """One layer's expert work, where the device computes what the native kernels compute.

    Every choice of a token has a row of its own, whoever computes it, and the rows are added up at
    the end in the order of the experts' numbers: the bits do not depend on the placement.
    """

    def __init__(self, backend: NativeBackend, device: EmulatedDevice, watch: Watch) -> None:
        self._backend = backend
        self._device = device
        self._watch = watch

    def run(self, x: Tensor, routing: Routing, placement: Placement, supplied: Supplied) -> Tensor:
        """x [T, H] to the weighted sum of each row's experts, [T, H] in the dtype of x."""
        job = ExpertJob(placement.layer, x, routing, out_dtype=x.dtype)
        parts = self._backend.in_parts(job)
        self.compute(parts, routing, placement, supplied)
        return parts.total()

    def compute(
        self, parts: NativeParts, routing: Routing, placement: Placement, supplied: Supplied
    ) -> None:
        """Everything that is supplied, into `parts`. Of every group the device takes its share
        first, and computes it beside the CPU's."""
        device, layer = self._device, placement.layer
        costs = device.costs(layer)
        rows = np.bincount(routing.ids.numpy().ravel(), minlength=len(supplied.slots.slots))
        on_cpu = frozenset(placement.on_cpu)
        device.begin_layer(layer)
        for group in supplied.groups:
            here = [e for e in group if e in on_cpu]
            there = [e for e in group if e not in on_cpu]
            device.submit(parts, rows, there, supplied.slots)
            if here:
                cpu_us = costs.cpu_start_us + sum([costs.cpu_us(int(rows[e])) for e in here])
                with device.clock.cpu_work(cpu_us), self._watch.computing(layer, here):
                    parts.add(here)
        device.wait(layer)
