"""Runs a placement: CPU work beside device work, then the sum of both."""

from __future__ import annotations

from torch import Tensor

from moeserve.core import Placement, Routing
from moeserve.cpu_backend.backend import CpuBackend, ExpertJob, ExpertParts
from moeserve.experts.device.torch_grouped import GroupedExperts
from moeserve.experts.supply import Supplied
from moeserve.experts.watch import Watch


class Executor:
    """One layer's expert work. `device` is None where the layer has no experts on a device."""

    def __init__(
        self, backend: CpuBackend, device: GroupedExperts | None, watch: Watch | None = None
    ) -> None:
        self._backend = backend
        self._device = device
        self._watch = watch or Watch()

    def run(self, x: Tensor, routing: Routing, placement: Placement, supplied: Supplied) -> Tensor:
        """x [T, H] to the weighted sum of each row's experts, [T, H] in the dtype of x.

        Sums are kept in float32 and rounded once. A row adds its experts in the order of its
        routing on each side, and then the two sides.
        """
        if self._device is None:
            job = ExpertJob(placement.layer, x, routing, out_dtype=x.dtype)
            return self._on_cpu(job, placement, supplied)
        if not placement.on_cpu:
            return self._device.run(x, routing, supplied.slots).to(x.dtype)
        host_routing = Routing(routing.ids.cpu(), routing.weights.cpu())
        job = ExpertJob(placement.layer, x.cpu(), host_routing, placement.on_cpu)
        ticket = self._backend.submit(job)
        on_device = placement.on_device + placement.fetch_first
        total = self._device.run(x, routing, supplied.slots, on_device)
        return (total + ticket.wait().to(total.device)).to(x.dtype)

    def compute(
        self, parts: ExpertParts, routing: Routing, placement: Placement, supplied: Supplied
    ) -> None:
        """Everything that is supplied, on the CPU, into `parts`."""
        for experts in supplied.groups:
            with self._watch.computing(placement.layer, experts):
                parts.add(experts)

    def _on_cpu(self, job: ExpertJob, placement: Placement, supplied: Supplied) -> Tensor:
        """Everything in one call where it is there, which gives the same as part by part."""
        if not placement.fetch_first:
            with self._watch.computing(job.layer):
                return self._backend.run(job)
        parts = self._backend.in_parts(job)
        self.compute(parts, job.routing, placement, supplied)
        with self._watch.computing(job.layer, ()):
            return parts.total()
