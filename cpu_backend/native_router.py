"""Routers on the native kernels: product, scores, choice and weights in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.core import Routing
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.native_linear import NativeLinear

#: in the order of router.h
SCORES = ("softmax", "sigmoid", "softmax_topk")


class NativeRouter:
    """x [T, H] to the Routing of its tokens, by the rules of experts/router.py.

    A row's choice and the bits of its weights depend on that row alone.
    """

    def __init__(
        self, gate: NativeLinear, *, top_k: int, score: str, float32_logits: bool, normalize: bool,
        normalize_eps: float, scale: float, num_groups: int, top_groups: int, group_top2: bool,
        correction: Tensor | None, round_weights: bool,
    ) -> None:  # fmt: skip
        self._runtime = gate.weight.runtime
        self._top_k = top_k
        self.handle = _native.Router(
            gate.matrix,
            top_k,
            SCORES.index(score),
            float32_logits,
            normalize,
            normalize_eps,
            scale,
            num_groups,
            top_groups,
            group_top2,
            None if correction is None else correction.contiguous().numpy(),
            round_weights,
        )

    def __call__(self, x: Tensor) -> Routing:
        ids = torch.empty(x.shape[0], self._top_k, dtype=torch.int64)
        weights = torch.empty(x.shape[0], self._top_k)
        self.handle.run(self._runtime, x, ids, weights)
        return Routing(ids=ids, weights=weights)
