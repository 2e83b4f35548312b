"""What the engine's side of expert workers passes around."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import zmq
from numpy.typing import NDArray
from torch import Tensor

from moeserve.client.endpoint import CurveKeys
from moeserve.config import ExpertConfig
from moeserve.endpoints import is_loopback, tcp_host
from moeserve.worker_messages import WorkerIdentity

#: numbers t * K + k of row t with its k-th expert
Pairs: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class PairRows:
    """Rows for experts of one layer. pairs: [P] numbers of the caller's, sorted by `experts` [P];
    rows: [P, H]."""

    layer: int
    pairs: Pairs
    experts: NDArray[np.int64]
    rows: Tensor


@dataclass(frozen=True)
class Answer:
    """What a worker gave for pairs [P]: [P, H] float32, valid until the link's next job."""

    pairs: Pairs
    experts: NDArray[np.int64]
    results: Tensor


@dataclass
class LinkCounters:
    """What one worker was asked and gave. rows: each with one expert. Bytes: of rows and of
    results, in frames or in shared memory. busy_s: it computed, it says. connects: sessions that
    began; losses: that broke; refusals: that the engine would not have."""

    jobs: int = 0
    rows: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    busy_s: float = 0.0
    connects: int = 0
    losses: int = 0
    refusals: int = 0


@dataclass(frozen=True)
class LinkSettings:
    """The same for all workers of an engine. sockets: all that are open. keys: None: no CURVE."""

    context: zmq.Context[zmq.Socket[bytes]]
    sockets: set[zmq.Socket[bytes]]
    identity: WorkerIdentity
    config: ExpertConfig
    keys: CurveKeys | None


def differences(ours: WorkerIdentity, theirs: WorkerIdentity) -> str | None:
    """What would make the worker's results other bits than ours; None: nothing."""
    found = [
        f"{name} {getattr(theirs, name)} there, {getattr(ours, name)} here"
        for name in WorkerIdentity.__struct_fields__
        if getattr(theirs, name) != getattr(ours, name)
    ]
    return "; ".join(found) or None


def is_near(endpoint: str) -> bool:
    """Whether the worker may be on this machine; the token in the memory then tells."""
    return endpoint.startswith("ipc://") or is_loopback(tcp_host(endpoint))
