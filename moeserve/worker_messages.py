"""The wire between an engine and its expert workers, typed. moeserve.framing says how it travels.

Private: both ends are of the same version, which the handshake checks.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from moeserve.messages import Message, Ping

# -- engine → expert worker -----------------------------------------------------------------------


class WorkerIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine and a worker must have in common for their results to be the same bits.

    manifest_sha256: of the packed model's manifest, which has a checksum of every expert. layout:
    version of the packed bytes. integers: whether inputs are rounded to int8; None: as packed.
    """

    version: str  # of moeserve
    config_sha256: str
    manifest_sha256: str
    layout: int
    isa: str
    integers: bool | None


class SharedMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of the engine that a worker on the same machine may map: /proc/PID/fd/FD.

    token: what it begins with; who reads the same there has found the right memory.
    """

    pid: int
    fd: int
    num_bytes: int
    token: bytes


class WorkerHello(Message, frozen=True, kw_only=True, tag="worker_hello"):
    """Opens a session; answered by WorkerWelcome."""

    identity: WorkerIdentity
    memory: SharedMemory | None = None


class WorkerJob(Message, frozen=True, kw_only=True, tag="worker_job"):
    """Rows for experts of one layer; answered by WorkerResult with the same number.

    dtype, rows: [P, H] in "float32" or "bfloat16", the rows of experts[0] first, counts[0] of them.
    rows_at: where in the shared memory they begin; None: they are frame 2. results_at: likewise for
    the results, [P, H] float32; None: they are frame 2 of the answer.
    """

    number: int
    layer: int
    experts: list[int]
    counts: list[int]
    dtype: str
    rows_at: int | None = None
    results_at: int | None = None


# -- expert worker → engine -----------------------------------------------------------------------


class WorkerWelcome(Message, frozen=True, kw_only=True, tag="worker_welcome"):
    """shard: as `moeserve worker --shard` has it. epoch: random per worker process. shared: the
    worker has mapped the memory that the hello named."""

    epoch: str
    identity: WorkerIdentity
    shard: str
    standby: bool
    shared: bool


class WorkerResult(Message, frozen=True, kw_only=True, tag="worker_result"):
    """busy_s: what computing it took, for statistics."""

    number: int
    busy_s: float = 0.0


class WorkerRefusal(Message, frozen=True, kw_only=True, tag="worker_refusal"):
    """The job, or with None the last message, makes no sense to the worker."""

    number: int | None
    reason: str


ToWorker: TypeAlias = WorkerHello | WorkerJob
FromWorker: TypeAlias = WorkerWelcome | WorkerResult | WorkerRefusal | Ping
