"""Experts on our own kernels."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

from moeserve.core import ExpertSpec, ExpertWeights, ModelError
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.backend import CpuBackend, Demands, ExpertJob
from moeserve.cpu_backend.native_parts import NativeParts
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts, dense_format


class NativeTicket:
    """A Ticket on submitted work; keeps alive what it reads and writes. So does the backend until
    the work is done, for tickets that nobody keeps."""

    def __init__(self, ticket: _native.Ticket, job: ExpertJob, held: object, out: Tensor) -> None:
        self._ticket = ticket
        self._held = (job, held)
        self._out = out

    def done(self) -> bool:
        return bool(self._ticket.done())

    def wait(self) -> Tensor:
        self._ticket.wait()
        return self._out


class NativeBackend(CpuBackend):
    """A row's bits depend on that row alone: not on its neighbours, their number, or the number of
    threads. Submitted jobs run on the runtime's threads, one after another.
    """

    name = "native"

    @classmethod
    def lacks(cls, demands: Demands) -> str | None:
        if demands.quantized or demands.dtype in (torch.float32, torch.bfloat16):
            return None
        dtype = str(demands.dtype).removeprefix("torch.")
        return f"it keeps float32 and bfloat16 weights, no {dtype} ones"

    def __init__(self, runtime: NativeRuntime) -> None:
        self.runtime = runtime
        self._layers: dict[int, PackedExperts] = {}
        self._pending: deque[NativeTicket] = deque()  # in their order, which is that of their ends
        self._parts_memory: list[_native.ExpertParts] = []  # that no job uses now

    def add_layer(
        self, layer: int, spec: ExpertSpec, weights: ExpertWeights | PackedExperts
    ) -> None:
        """Packs ExpertWeights into memory of its own; packed experts are used as they are."""
        if layer in self._layers:
            raise ModelError(f"layer {layer}: its experts were added before")
        if isinstance(weights, ExpertWeights):
            weights = pack_experts(self.runtime, spec, weights)
        self._layers[layer] = weights

    def run(self, job: ExpertJob) -> Tensor:
        experts, ids, weights, wanted, out = self._arguments(job)
        experts.run(self.runtime.handle, job.x, ids, weights, wanted, out)
        return out

    def submit(self, job: ExpertJob) -> NativeTicket:
        experts, ids, weights, wanted, out = self._arguments(job)
        ticket = experts.submit(self.runtime.handle, job.x, ids, weights, wanted, out)
        handle = NativeTicket(ticket, job, (ids, weights, wanted), out)
        while self._pending and self._pending[0].done():
            self._pending.popleft()
        self._pending.append(handle)
        return handle

    def in_parts(self, job: ExpertJob) -> NativeParts:
        layer = self._layers[job.layer].native
        return NativeParts(self.runtime, layer, job, self._parts_memory)

    def close(self) -> None:
        """The threads end with the runtime."""
        while self._pending:
            self._pending.popleft().wait()

    def _arguments(
        self, job: ExpertJob
    ) -> tuple[_native.PackedExperts, Tensor, Tensor, Tensor | None, Tensor]:
        experts = self._layers[job.layer]
        wanted = None
        if job.experts is not None:
            mask = np.zeros(experts.spec.num_experts, dtype=np.uint8)
            mask[list(job.experts)] = 1
            wanted = torch.from_numpy(mask)
        out = self.runtime.empty_rows(len(job.x), experts.spec.hidden_size, job.out_dtype)
        ids, weights = job.routing.ids.contiguous(), job.routing.weights.contiguous()
        return experts.native, ids, weights, wanted, out


def pack_experts(runtime: NativeRuntime, spec: ExpertSpec, weights: ExpertWeights) -> PackedExperts:
    """A packed copy in the format that keeps their numbers."""
    packed = PackedExperts(runtime.handle, spec, dense_format(weights.down.dtype))
    gate_up_rows = torch.arange(2 * spec.intermediate_size)
    down_rows = torch.arange(spec.hidden_size)
    for expert in range(spec.num_experts):
        packed.put_gate_up(expert, gate_up_rows, weights.gate_up[expert])
        packed.put_down(expert, down_rows, weights.down[expert])
    if weights.gate_up_bias is not None and weights.down_bias is not None:
        packed.put_biases(weights.gate_up_bias, weights.down_bias)
    return packed
