"""The interface that every CPU backend has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from moeserve.core import ExpertSpec, ExpertWeights, Routing
from moeserve.cpu_backend.packing import PackedExperts


@dataclass(frozen=True)
class Demands:
    """What a model asks of the backend that computes its experts.

    dtype: of activations, and of weights that are not quantized. experts: of its MoE layers.
    quantized: the weights are packed already, or will be in 8 bits or fewer.
    """

    dtype: torch.dtype
    experts: tuple[ExpertSpec, ...] = ()
    quantized: bool = False


@dataclass(frozen=True)
class ExpertJob:
    """Expert work of one layer: for every row, the weighted sum over its experts.

    x: [T, H] in the compute dtype, contiguous. routing: ids and weights [T, K] of the same rows.
    experts: the experts to compute, None for all; the others add nothing, so that what the CPU and
    the device compute of one layer adds up to the whole.
    out_dtype: of the sums, which are kept in float32 until they are complete.
    """

    layer: int
    x: Tensor
    routing: Routing
    experts: tuple[int, ...] | None = None
    out_dtype: torch.dtype = torch.float32


class Ticket(Protocol):
    """The handle of a submitted job."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> Tensor:
        """Blocks until the job is done and returns its sums, [T, H] in the job's out_dtype.

        Raises what the job raised.
        """


class ExpertParts(ABC):
    """One job whose experts are computed part by part, as they become readable."""

    @abstractmethod
    def add(self, experts: Sequence[int]) -> None:
        """Computes these, which no part had before; experts that no row chose cost nothing."""

    @abstractmethod
    def total(self) -> Tensor:
        """The weighted sums over all parts, [T, H] in the job's out_dtype."""


class RunningSum(ExpertParts):
    """Adds the sums of each part to those before it: their last bits depend on the order."""

    def __init__(self, backend: CpuBackend, job: ExpertJob) -> None:
        self._backend = backend
        self._job = job
        self._sum = torch.zeros(job.x.shape)

    def add(self, experts: Sequence[int]) -> None:
        part = replace(self._job, experts=tuple(experts), out_dtype=torch.float32)
        self._sum += self._backend.run(part)

    def total(self) -> Tensor:
        return self._sum.to(self._job.out_dtype)


class CpuBackend(ABC):
    """Runs experts on CPU threads.

    A row's result must not depend on the other rows of its job, as far as the arithmetic underneath
    allows; each backend says how far that is.
    """

    name: str

    @classmethod
    @abstractmethod
    def lacks(cls, demands: Demands) -> str | None:
        """What of the demands it cannot do here, and the fix; None: it can run the model."""

    @abstractmethod
    def add_layer(
        self, layer: int, spec: ExpertSpec, weights: ExpertWeights | PackedExperts
    ) -> None:
        """Makes the experts of a layer known. Keeps a reference to weights in the form that the
        backend computes with; others it copies.

        Raises ModelError where weights and spec do not fit, or the layer is there already.
        """

    @abstractmethod
    def submit(self, job: ExpertJob) -> Ticket:
        """Starts the job and returns at once; jobs run one after another, in order."""

    @abstractmethod
    def run(self, job: ExpertJob) -> Tensor:
        """What `submit(job).wait()` gives, on the calling thread: nothing runs beside it, so the
        hand-over to another thread would be time lost."""

    def in_parts(self, job: ExpertJob) -> ExpertParts:
        """The same job, its experts to be named part by part; job.experts must be None."""
        return RunningSum(self, job)

    @abstractmethod
    def close(self) -> None:
        """Finishes the jobs that were submitted and ends the threads. May be called twice."""
