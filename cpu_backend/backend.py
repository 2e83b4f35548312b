"""The interface that every CPU backend has, and the choice between them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeserve.core import ConfigError, ExpertSpec, ExpertWeights, Routing
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts

logger = logging.getLogger(__name__)

#: names of the backends, for settings
BACKENDS = ("auto", "native", "torch")


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


class CpuBackend(ABC):
    """Runs experts on CPU threads.

    A row's result must not depend on the other rows of its job, as far as the arithmetic underneath
    allows; each backend says how far that is.
    """

    name: str

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

    @abstractmethod
    def close(self) -> None:
        """Finishes the jobs that were submitted and ends the threads. May be called twice."""


@dataclass(frozen=True)
class BackendChoice:
    """What experts on the CPU run on, and why. native: where it is the native backend."""

    backend: CpuBackend
    reason: str
    native: NativeRuntime | None


def choose_backend(
    name: str, num_threads: int | None = None, isa: str = "auto", pin: bool = False
) -> BackendChoice:
    """The backend called `name`, one of BACKENDS. Logs what was chosen.

    Raises ConfigError for another name, and for an ISA level that cannot run here.
    """
    from moeserve.cpu_backend.native_backend import NativeBackend
    from moeserve.cpu_backend.torch_backend import TorchBackend

    if name not in BACKENDS:
        raise ConfigError(f"cpu_backend: {name!r} is not one of {', '.join(BACKENDS)}")
    if name == "torch":
        logger.info("cpu backend: torch (asked for)")
        return BackendChoice(TorchBackend(), "torch (asked for)", None)
    runtime = NativeRuntime(num_threads, isa, pin)
    why = "asked for" if name == "native" else "auto: the fastest for weights on the CPU"
    logger.info("cpu backend: native (%s)", why)
    return BackendChoice(NativeBackend(runtime), f"native ({why}); {runtime.reason}", runtime)
