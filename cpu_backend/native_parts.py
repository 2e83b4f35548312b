"""Experts of one job computed part by part, as they become readable."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moeserve.cpu_backend import _native
from moeserve.cpu_backend.backend import ExpertJob, ExpertParts


class NativeParts(ExpertParts):
    """The bits of the whole job in one call, whatever the parts and their order: every choice of
    a token has a row of its own, and the rows are added up at the end, by the experts' numbers.
    """

    def __init__(
        self, runtime: _native.Runtime, experts: _native.PackedExperts, job: ExpertJob
    ) -> None:
        self._runtime = runtime
        self._experts = experts
        self._job = job
        ids = job.routing.ids.contiguous()
        self._ids = ids
        self._top_k = ids.shape[1]
        self._pair_ids = ids.view(-1, 1)  # [T * K, 1]
        self._pair_numbers = self._pair_ids[:, 0].numpy()
        # Zeros: an expert that the job leaves out adds nothing.
        self._pairs = torch.zeros(len(self._pair_ids), job.x.shape[1])  # [T * K, H]

    def add(self, experts: Sequence[int]) -> None:
        chosen = torch.from_numpy(np.flatnonzero(np.isin(self._pair_numbers, experts)))  # [P]
        if not len(chosen):
            return
        ids = self._pair_ids[chosen]
        rows = self._job.x[chosen // self._top_k]  # [P, H]
        out = torch.empty(len(chosen), rows.shape[1])
        self._experts.run(self._runtime, rows, ids, torch.ones(len(chosen), 1), None, out)
        self._pairs[chosen] = out

    def total(self) -> Tensor:
        job = self._job
        out = torch.empty(job.x.shape, dtype=job.out_dtype)
        weights = job.routing.weights.contiguous()
        _native.sum_pairs(self._runtime, self._pairs, self._ids, weights, out)
        return out
