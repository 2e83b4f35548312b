"""Dense and shared FFNs on the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.core import Routing
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_router import NativeRouter
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts


class NativeFfn:
    """A gated FFN, x [T, H] -> [T, H]: the one expert of its layer, which every row takes."""

    def __init__(
        self, runtime: NativeRuntime, experts: PackedExperts, gate: NativeRouter | None = None
    ) -> None:
        """gate: chooses the one expert and says with what weight; None: it is 1."""
        self._runtime = runtime
        self._experts = experts
        self._gate = gate

    @property
    def part(self) -> tuple[_native.Router | None, _native.PackedExperts]:
        """As `_native.FfnLayer` takes it."""
        return None if self._gate is None else self._gate.handle, self._experts.native

    def __call__(self, x: Tensor) -> Tensor:
        out = self._runtime.empty_rows(len(x), x.shape[1], x.dtype)
        chosen = _every_row(len(x)) if self._gate is None else self._gate(x)
        self._experts.native.run(self._runtime.handle, x, chosen.ids, chosen.weights, None, out)
        return out


def _every_row(num_rows: int) -> Routing:
    return Routing(torch.zeros(num_rows, 1, dtype=torch.int64), torch.ones(num_rows, 1))
