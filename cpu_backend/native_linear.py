"""Linear layers and norms on the native kernels, as callables of [T, K] tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedWeight


class NativeLinear:
    """x [T, K] -> x @ weight.T + bias [T, N], in the dtype of x or in `out_dtype`.

    A row's bits depend on that row alone.
    """

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> None:
        self.weight = weight
        self._num_outputs = weight.layout.rows
        self._out_dtype = out_dtype
        self._runtime = weight.runtime
        held_bias = None if bias is None else bias.float().contiguous().numpy()
        self.matrix = _native.PackedMatrix(weight.layout, weight.data, held_bias)

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], self._num_outputs, dtype=self._out_dtype or x.dtype)
        self.matrix.run(self._runtime, x, out)
        return out


class NativeHead:
    """The final norm and the head, x [R, H] -> logits [R, V] float32."""

    def __init__(self, norm: NativeRmsNorm, head: NativeLinear) -> None:
        self._runtime = norm.runtime
        self._num_outputs = head.weight.layout.rows
        self._head = _native.Head(norm.weight.numpy(), norm.eps, head.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        logits = self._runtime.empty_rows(len(x), self._num_outputs, torch.float32)
        self._head.run(self._runtime.handle, x, logits)
        return logits


class NativeRmsNorm:
    """Root mean square norm (arXiv:1910.07467) of each row of [T, H], rounded once."""

    def __init__(self, runtime: NativeRuntime, weight: Tensor, eps: float) -> None:
        self.runtime = runtime
        self.weight = weight.float().contiguous()
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        out = self.runtime.empty_rows(len(x), x.shape[1], x.dtype)
        _native.rms_norm(self.runtime.handle, x, self.weight, self.eps, out)
        return out
