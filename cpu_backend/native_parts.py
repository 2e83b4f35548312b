"""Experts of one job computed part by part, as they become readable."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.cpu_backend import _native
from moeserve.cpu_backend.backend import ExpertJob, ExpertParts
from moeserve.cpu_backend.native_runtime import NativeRuntime


class NativeParts(ExpertParts):
    """The bits of the whole job in one call, whatever the parts and their order
    (`csrc/expert_parts.h`)."""

    def __init__(
        self,
        runtime: NativeRuntime,
        experts: _native.PackedExperts,
        job: ExpertJob,
        kept: list[_native.ExpertParts],
    ) -> None:
        """kept: memory that no job uses now. One is taken, and given back with the total."""
        self._runtime = runtime
        self._experts = experts
        self._job = job
        self._ids = job.routing.ids.contiguous()
        self._kept = kept
        self._parts = kept.pop() if kept else _native.ExpertParts()
        self._parts.begin(job.x, self._ids)

    @property
    def pairs(self) -> Tensor:
        """[T * K, H] float32: what each choice of a row gave."""
        return torch.from_numpy(self._parts.rows())

    def add(self, experts: Sequence[int], stored: _native.PackedExperts | None = None) -> None:
        """stored: the same experts as they stand elsewhere; None: where the backend has them."""
        self._parts.add(self._runtime.handle, self._experts if stored is None else stored, experts)

    def put(self, pairs: NDArray[np.int64], results: Tensor) -> None:
        """What was computed elsewhere: results [P, H] float32 for pairs [P], numbered t * K + k."""
        self._parts.put(pairs, results)

    def total(self) -> Tensor:
        """To be asked for once: its memory is the next job's."""
        job = self._job
        out = self._runtime.empty_rows(len(job.x), job.x.shape[1], job.out_dtype)
        self._parts.total(self._runtime.handle, job.routing.weights.contiguous(), out)
        self._kept.append(self._parts)
        return out
