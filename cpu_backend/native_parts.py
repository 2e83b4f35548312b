"""Experts of one job computed part by part, as they become readable."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.cpu_backend import _native
from moeserve.cpu_backend.backend import ExpertJob, ExpertParts


class RowMemory:
    """Memory of rows that one job after the other uses; its contents are lost when it grows.

    Rows of all choices of a step are megabytes, and never twice as many. What malloc is given back
    of such sizes it keeps, in pieces that fit the next ones badly.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[num_rows, width], with whatever stands there."""
        wanted = num_rows * width * dtype.itemsize
        if wanted > len(self._bytes):
            del self._bytes  # before there is more: nothing of it is kept
            # Only pages that are written count, so there may be more of them than are wanted now.
            room = mmap.mmap(-1, 1 << (wanted - 1).bit_length(), flags=mmap.MAP_PRIVATE)
            self._bytes = torch.frombuffer(room, dtype=torch.uint8)
        return self._bytes[:wanted].view(dtype).view(num_rows, width)


class PartsMemory:
    """pairs: what each choice of a row gave. rows, results: of a part that is computed."""

    def __init__(self) -> None:
        self.pairs, self.rows, self.results = RowMemory(), RowMemory(), RowMemory()


class NativeParts(ExpertParts):
    """The bits of the whole job in one call, whatever the parts and their order: every choice of
    a token has a row of its own, and the rows are added up at the end, by the experts' numbers.
    """

    def __init__(
        self,
        runtime: _native.Runtime,
        experts: _native.PackedExperts,
        job: ExpertJob,
        kept: list[PartsMemory],
    ) -> None:
        """kept: memory that no job uses now. One is taken, and given back with the total."""
        self._runtime = runtime
        self._experts = experts
        self._job = job
        ids = job.routing.ids.contiguous()
        self._ids = ids
        self._top_k = ids.shape[1]
        self._pair_ids = ids.view(-1, 1)  # [T * K, 1]
        self._pair_numbers = self._pair_ids[:, 0].numpy()
        self._kept = kept
        self._memory = kept.pop() if kept else PartsMemory()
        self.pairs = self._memory.pairs.take(len(ids) * self._top_k, job.x.shape[1], torch.float32)
        self._lacking = np.ones(len(self._pair_ids), np.bool_)  # nothing stands there yet

    def add(self, experts: Sequence[int], stored: _native.PackedExperts | None = None) -> None:
        """stored: the same experts as they stand elsewhere; None: where the backend has them."""
        wanted = np.zeros(1 + max([int(self._pair_numbers.max(initial=0)), *experts]), np.bool_)
        wanted[list(experts)] = True
        chosen = torch.from_numpy(np.flatnonzero(wanted[self._pair_numbers]))  # [P]
        if not len(chosen):
            return
        x = self._job.x
        rows = self._memory.rows.take(len(chosen), x.shape[1], x.dtype)
        torch.index_select(x, 0, chosen // self._top_k, out=rows)
        results = self._memory.results.take(len(chosen), x.shape[1], torch.float32)
        source = self._experts if stored is None else stored
        ones = torch.ones(len(chosen), 1)
        source.run(self._runtime, rows, self._pair_ids[chosen], ones, None, results)
        self._put(chosen, results)

    def put(self, pairs: NDArray[np.int64], results: Tensor) -> None:
        """What was computed elsewhere: results [P, H] float32 for pairs [P], numbered t * K + k."""
        self._put(torch.from_numpy(pairs), results)

    def _put(self, pairs: Tensor, results: Tensor) -> None:
        self.pairs.index_copy_(0, pairs, results)
        self._lacking[pairs.numpy()] = False

    def total(self) -> Tensor:
        """To be asked for once: its memory is the next job's."""
        job = self._job
        # An expert that the job leaves out adds nothing.
        self.pairs[torch.from_numpy(np.flatnonzero(self._lacking))] = 0
        out = torch.empty(job.x.shape, dtype=job.out_dtype)
        weights = job.routing.weights.contiguous()
        _native.sum_pairs(self._runtime, self.pairs, self._ids, weights, out)
        self._kept.append(self._memory)
        return out
