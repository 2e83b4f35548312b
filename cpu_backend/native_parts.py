"""Experts of one job computed part by part, as they become readable."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
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
        self.pairs = torch.zeros(len(self._pair_ids), job.x.shape[1])  # [T * K, H]

    def add(self, experts: Sequence[int], stored: _native.PackedExperts | None = None) -> None:
        """stored: the same experts as they stand elsewhere; None: where the backend has them."""
        wanted = np.zeros(1 + max([int(self._pair_numbers.max(initial=0)), *experts]), np.bool_)
        wanted[list(experts)] = True
        chosen = torch.from_numpy(np.flatnonzero(wanted[self._pair_numbers]))  # [P]
        if not len(chosen):
            return
        ids = self._pair_ids[chosen]
        rows = self._job.x[chosen // self._top_k]  # [P, H]
        out = torch.empty(len(chosen), rows.shape[1])
        source = self._experts if stored is None else stored
        source.run(self._runtime, rows, ids, torch.ones(len(chosen), 1), None, out)
        self.pairs[chosen] = out

    def put(self, pairs: NDArray[np.int64], results: Tensor) -> None:
        """What was computed elsewhere: results [P, H] float32 for pairs [P], numbered t * K + k."""
        self.pairs[torch.from_numpy(pairs)] = results

    def total(self) -> Tensor:
        job = self._job
        out = torch.empty(job.x.shape, dtype=job.out_dtype)
        weights = job.routing.weights.contiguous()
        _native.sum_pairs(self._runtime, self.pairs, self._ids, weights, out)
        return out
