"""The expert worker: computes rows for the experts of its shard, for any number of engines.

It is one thread and one ROUTER socket. While it computes, ZeroMQ's own thread answers heartbeats
(ZMTP 3.1, ZMQ_HEARTBEAT_IVL), so nobody takes a worker that is busy for one that is gone.

A worker adds nothing up: every row comes with one expert, and its result goes back as it is. Which
process computed it can then not be told from the sum, which the engine makes.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import zmq
from torch import Tensor

from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedExperts
from moeserve.cpu_backend.shards import Shard
from moeserve.cpu_backend.shared_rows import SharedRows
from moeserve.cpu_backend.worker_wire import worker_side_wire
from moeserve.framing import ProtocolError
from moeserve.messages import Message, Ping
from moeserve.worker_messages import (
    WorkerHello,
    WorkerIdentity,
    WorkerJob,
    WorkerRefusal,
    WorkerResult,
    WorkerWelcome,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldExperts:
    """What a worker works with. layers: of every MoE layer the experts, of which those of `shard`
    have their records."""

    identity: WorkerIdentity
    shard: Shard
    layers: Mapping[int, PackedExperts]


class ExpertWorker:
    """Serves until its context is terminated."""

    def __init__(self, held: HeldExperts, runtime: NativeRuntime, standby: bool = False) -> None:
        """standby: it is content not to be asked while another worker holds the same experts."""
        self._held = held
        self._runtime = runtime
        self._standby = standby
        self._epoch = secrets.token_hex(8)
        self._wire = worker_side_wire()
        self._engines: dict[bytes, SharedRows | None] = {}  # by routing id

    def serve(self, socket: zmq.Socket[bytes]) -> None:
        """socket: a bound ROUTER with ZMQ_ROUTER_MANDATORY."""
        try:
            while True:
                sender, *frames = socket.recv_multipart()
                self._send(socket, sender, self._answer(socket, sender, frames))
        except zmq.ContextTerminated:
            return
        finally:
            for sender in list(self._engines):
                self._forget(sender)

    def _answer(
        self, socket: zmq.Socket[bytes], sender: bytes, frames: Sequence[bytes]
    ) -> Sequence[bytes | memoryview]:
        number = None
        try:
            message, raw = self._wire.decode(frames)
            if isinstance(message, WorkerHello):
                self._forget_gone(socket)
                return self._encode(self._welcome(sender, message))
            number = message.number
            return self._compute(sender, message, raw)
        except ProtocolError as error:
            logger.warning("refused: %s", error)
            return self._encode(WorkerRefusal(number=number, reason=str(error)))

    def _welcome(self, sender: bytes, hello: WorkerHello) -> WorkerWelcome:
        self._forget(sender)
        rows = None if hello.memory is None else SharedRows.attach(hello.memory)
        self._engines[sender] = rows
        logger.info("an engine: rows %s", "in frames" if rows is None else "in shared memory")
        return WorkerWelcome(
            epoch=self._epoch,
            identity=self._held.identity,
            shard=str(self._held.shard),
            standby=self._standby,
            shared=rows is not None,
        )

    def _compute(
        self, sender: bytes, job: WorkerJob, raw: Sequence[bytes]
    ) -> Sequence[bytes | memoryview]:
        """Raises ProtocolError for a job that makes no sense here."""
        if sender not in self._engines:
            raise ProtocolError("job: before any hello")
        experts = self._held.layers.get(job.layer)
        dtype = DTYPES.get(job.dtype)
        if experts is None or dtype is None:
            raise ProtocolError(f"job: layer {job.layer} in {job.dtype!r:.20}: there is none")
        own = self._held.shard.experts(experts.spec.num_experts)
        if len(job.experts) != len(job.counts) or min(job.counts, default=0) < 1:
            raise ProtocolError("job: every expert takes a count of at least 1")
        if not all(expert in own for expert in job.experts):
            raise ProtocolError(f"job: experts {job.experts} are not all in {self._held.shard}")
        shape = (sum(job.counts), experts.spec.hidden_size)
        shared = self._engines[sender]
        rows = _rows_of(job, shape, dtype, shared, raw)
        ids = torch.from_numpy(np.repeat(np.array(job.experts, np.int64), job.counts))
        out = _room_for_results(job, shape, shared)
        weights = torch.ones(shape[0], 1)
        begun_s = time.perf_counter()
        experts.native.run(self._runtime.handle, rows, ids.view(-1, 1), weights, None, out)
        busy_s = time.perf_counter() - begun_s
        frames = self._encode(WorkerResult(number=job.number, busy_s=busy_s))
        return frames if job.results_at is not None else [*frames, out.numpy().data]

    def _encode(self, message: Message) -> list[bytes]:
        return self._wire.encode(message)

    def _send(
        self, socket: zmq.Socket[bytes], to: bytes, frames: Sequence[bytes | memoryview]
    ) -> bool:
        """False, and the engine is forgotten, where it is gone or does not read."""
        try:
            socket.send_multipart([to, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._forget(to)
            return False
        return True

    def _forget_gone(self, socket: zmq.Socket[bytes]) -> None:
        """ZeroMQ says that a peer is gone when one writes to it, and not before."""
        for engine in list(self._engines):
            self._send(socket, engine, self._encode(Ping()))

    def _forget(self, engine: bytes) -> None:
        rows = self._engines.pop(engine, None)
        if rows is not None:
            rows.close()


def _rows_of(
    job: WorkerJob,
    shape: tuple[int, int],
    dtype: torch.dtype,
    shared: SharedRows | None,
    raw: Sequence[bytes],
) -> Tensor:
    if job.rows_at is not None:
        rows = None if shared is None else shared.view(job.rows_at, shape, dtype)
        if rows is None:
            raise ProtocolError(f"job: rows {list(shape)} at {job.rows_at} are not in the memory")
        return rows
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    if len(raw) != 1 or len(raw[0]) != num_bytes:
        found = [len(frame) for frame in raw]
        raise ProtocolError(f"job: one frame of {num_bytes} bytes expected, found {found}")
    return torch.frombuffer(bytearray(raw[0]), dtype=dtype).view(shape)


def _room_for_results(job: WorkerJob, shape: tuple[int, int], shared: SharedRows | None) -> Tensor:
    if job.results_at is None:
        return torch.empty(shape)
    out = None if shared is None else shared.view(job.results_at, shape, torch.float32)
    if out is None:
        raise ProtocolError(f"job: results {list(shape)} at {job.results_at}: not in the memory")
    return out
