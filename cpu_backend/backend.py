"""The interface that every CPU backend has, and the choice between them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moeserve.core import ConfigError, ExpertSpec, ExpertWeights, Routing

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpertJob:
    """Expert work of one layer: for every row, the weighted sum over its experts.

    x: [T, H] in the compute dtype, contiguous. routing: ids and weights [T, K] of the same rows.
    experts: the experts to compute, None for all; the others add nothing, so that what the CPU and
    the device compute of one layer adds up to the whole.
    """

    layer: int
    x: Tensor
    routing: Routing
    experts: tuple[int, ...] | None = None


class Ticket(Protocol):
    """The handle of a submitted job."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> Tensor:
        """Blocks until the job is done and returns its sums, [T, H] float32.

        Raises what the job raised.
        """


class CpuBackend(ABC):
    """Runs experts on CPU threads.

    A row's result must not depend on the other rows of its job, as far as the arithmetic underneath
    allows; each backend says how far that is.
    """

    name: str

    @abstractmethod
    def add_layer(self, layer: int, spec: ExpertSpec, weights: ExpertWeights) -> None:
        """Makes the experts of a layer known. Keeps a reference to the weights, copies nothing.

        Raises ModelError where weights and spec do not fit, or the layer is there already.
        """

    @abstractmethod
    def submit(self, job: ExpertJob) -> Ticket:
        """Starts the job and returns at once; jobs run one after another, in order."""

    @abstractmethod
    def run(self, job: ExpertJob) -> Tensor:
        """What `submit(job).wait()` gives, on the calling thread: nothing runs beside it, so the
        hand-over to another thread would be time lost. [T, H] float32."""

    @abstractmethod
    def close(self) -> None:
        """Finishes the jobs that were submitted and ends the threads. May be called twice."""


def choose_backend(name: str) -> tuple[CpuBackend, str]:
    """The backend called `name` (auto or torch) and the reason for it, which is also logged."""
    from moeserve.cpu_backend.torch_backend import TorchBackend

    reasons = {
        "auto": "auto: the only CPU backend built so far",
        "torch": "asked for",
    }
    if name not in reasons:
        raise ConfigError(f"cpu_backend: {name!r} is not one of {', '.join(reasons)}")
    logger.info("cpu backend: torch (%s)", reasons[name])
    return TorchBackend(), f"torch ({reasons[name]})"
