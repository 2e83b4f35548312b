"""One expert worker as the engine sees it: connection, handshake, jobs, and noticing that it went.

A new socket is made for every connection, so that nothing of an old one, an answer that was long
under way for one, can be taken for an answer on the new. Two things say that a worker is gone: the
connection breaks, at once where the process dies, and after missed heartbeats where it is stopped
or out of reach; or a job takes too long, which is for a worker that hangs while its ZeroMQ thread
goes on answering heartbeats.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum

import numpy as np
import torch
import zmq
from torch import Tensor

from moeserve.core import ConfigError
from moeserve.cpu_backend.shards import Shard
from moeserve.cpu_backend.shared_rows import PAGE_BYTES, SHARED_BYTES, SharedRows
from moeserve.cpu_backend.worker_socket import WorkerSocket
from moeserve.cpu_backend.worker_types import (
    Answer,
    LinkCounters,
    LinkSettings,
    PairRows,
    differences,
    is_near,
)
from moeserve.cpu_backend.worker_wire import engine_side_wire
from moeserve.framing import ProtocolError
from moeserve.messages import Ping
from moeserve.stats import WorkerStats
from moeserve.worker_messages import (
    WorkerHello,
    WorkerJob,
    WorkerRefusal,
    WorkerResult,
    WorkerWelcome,
)

#: rows and results of one job together; larger ones are cut
MAX_JOB_BYTES = 16 << 20
#: a worker that was refused is looked at again
REST_S = 10.0

logger = logging.getLogger(__name__)


class Stage(Enum):
    CONNECTING = "does not answer"
    LIVE = "live"
    RESTING = "refused"


@dataclass(frozen=True)
class _Job:
    work: PairRows
    sent_s: float  # on this machine's monotonic clock
    results: Tensor | None  # in shared memory


class WorkerLink:
    """For the engine's thread alone.

    lost: what will not be answered any more; whoever sent it takes it out. admit: told of a worker
    that fits; returns why it is refused all the same, or None.
    """

    def __init__(
        self,
        endpoint: str,
        settings: LinkSettings,
        admit: Callable[[WorkerLink, Shard], str | None],
    ) -> None:
        self.endpoint = endpoint
        self.stage = Stage.CONNECTING
        self.problem = Stage.CONNECTING.value  # why it is not live
        self.shard: Shard | None = None
        self.standby = False
        self.shared = False
        self.lost: list[PairRows] = []
        self.count = LinkCounters()
        self._settings = settings
        self._admit = admit
        self._wire = engine_side_wire()
        self._number = 0
        self._jobs: dict[int, _Job] = {}
        self._epoch = ""
        self._distrusted: set[str] = set()
        self._rest_until_s = 0.0
        self._rows: SharedRows | None = None
        self._used_bytes = PAGE_BYTES
        self._socket: WorkerSocket
        self._open()

    # -- for the pool ----------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        return self.stage is Stage.LIVE

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], ...]:
        """To be polled; none while it rests."""
        if self.stage is Stage.RESTING:
            return ()
        return self._socket.monitor, self._socket.messages

    def look(self) -> list[Answer]:
        """Takes what has happened; never waits."""
        if self.stage is Stage.RESTING:
            if time.monotonic() >= self._rest_until_s:
                self._open()
            return []
        answers: list[Answer] = []
        # Messages first: what it said before it died counts.
        while (frames := self._socket.next_message()) is not None:
            answers += self._take(frames)
        while (event := self._socket.next_event()) is not None:
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._hello()
            elif event == zmq.EVENT_DISCONNECTED and self._greeted:
                if self.live:
                    self._lose("the connection broke, or heartbeats were missed")
                self._close()
                self._open()
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.problem = "it does not know this engine's key"
        return answers

    def check_deadlines(self) -> None:
        """Gives up a worker that takes too long for a job."""
        limit = self._settings.config.worker_job_s
        oldest = min((job.sent_s for job in self._jobs.values()), default=math.inf)
        if time.monotonic() >= oldest + limit:
            self._lose(f"a job was not done within {limit:g} s")
            self._close()
            self._open()

    def send(self, work: PairRows) -> None:
        """Must be live. Where the queue is full or the connection just broke, the work is lost."""
        width = work.rows.shape[1]
        most = max(1, MAX_JOB_BYTES // (width * (work.rows.dtype.itemsize + 4)))
        for start in range(0, len(work.pairs), most):
            part = slice(start, start + most)
            piece = PairRows(work.layer, work.pairs[part], work.experts[part], work.rows[part])
            if not self._send(piece):
                self.lost.append(piece)

    def give_up_jobs(self) -> None:
        """Nobody waits for them any more. Their results may still be written, so the memory and the
        connection are not used again."""
        if self._jobs:
            self._jobs.clear()
            self._close()
            self._open()

    def distrust(self, reason: str) -> None:
        """Its process is not asked again; another one at the same endpoint may be."""
        self._distrusted.add(self._epoch)
        self._refuse(reason)

    def stats(self) -> WorkerStats:
        """Since the start."""
        return WorkerStats(
            endpoint=self.endpoint,
            shard="" if self.shard is None else str(self.shard),
            live=self.live,
            standby=self.standby,
            shared_memory=self.live and self.shared,
            problem=self.problem,
            **asdict(self.count),
        )

    def close(self) -> None:
        if self.stage is not Stage.RESTING:
            self._close()
            self.stage = Stage.RESTING
            self._rest_until_s = math.inf

    # -- the connection --------------------------------------------------------------------------

    def _open(self) -> None:
        self._socket = WorkerSocket.open(self.endpoint, self._settings)
        self.stage = Stage.CONNECTING
        self._greeted = False  # until then ZeroMQ connects again by itself, with growing pauses

    def _close(self) -> None:
        self._socket.close(self._settings)
        self._jobs.clear()
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _hello(self) -> None:
        self._greeted = True
        self._rows = None
        if self._settings.config.worker_shared_memory and is_near(self.endpoint):
            self._rows = SharedRows.create(SHARED_BYTES)
        memory = None if self._rows is None else self._rows.offer
        hello = WorkerHello(identity=self._settings.identity, memory=memory)
        self._try_send(self._wire.encode(hello))

    def _lose(self, reason: str) -> None:
        """The worker is gone, and with it what it was asked."""
        logger.error("worker %s is gone: %s", self.endpoint, reason)
        self.problem = reason
        self.count.losses += 1
        self.lost += [job.work for job in self._jobs.values()]
        self._jobs.clear()

    def _refuse(self, reason: str) -> None:
        """Its process is there and will not be asked, for a while."""
        if reason != self.problem:  # said once, not at every look
            logger.error("worker %s is refused: %s", self.endpoint, reason)
        self.count.refusals += 1
        self.problem = reason
        self.lost += [job.work for job in self._jobs.values()]
        self._close()
        self.stage = Stage.RESTING
        self._rest_until_s = time.monotonic() + REST_S

    # -- messages --------------------------------------------------------------------------------

    def _take(self, frames: Sequence[bytes]) -> list[Answer]:
        try:
            message, raw = self._wire.decode(frames)
            if isinstance(message, WorkerWelcome):
                self._welcome(message)
            elif isinstance(message, WorkerResult):
                return [self._result(message, raw)]
            elif isinstance(message, WorkerRefusal):
                raise ProtocolError(f"it refused a job: {message.reason:.200}")
            else:
                assert isinstance(message, Ping)  # it looks whether we are there: so we are
        except ProtocolError as error:
            self.distrust(f"it answers nonsense: {error}")
        return []

    def _welcome(self, welcome: WorkerWelcome) -> None:
        """Raises ProtocolError for a shard that is none, and for a second welcome: it would begin
        the shared memory anew, on top of jobs that lie there."""
        if self.live:
            raise ProtocolError("a second welcome in one session")
        self._epoch = welcome.epoch
        if welcome.epoch in self._distrusted:
            self._refuse(self.problem)
            return
        try:
            shard = Shard.parse(welcome.shard)
        except ConfigError as error:
            raise ProtocolError(str(error)) from error
        problem = differences(self._settings.identity, welcome.identity)
        self.standby = welcome.standby
        if problem is None:
            problem = self._admit(self, shard)
        if problem is not None:
            self._refuse(problem)
            return
        self.shard = shard
        if not welcome.shared and self._rows is not None:
            self._rows.close()
            self._rows = None
        self.shared = self._rows is not None
        self._used_bytes = PAGE_BYTES
        self.stage = Stage.LIVE
        self.problem = ""
        self.count.connects += 1
        how = "shared memory" if self.shared else "frames"
        logger.info("worker %s: shard %s, rows in %s", self.endpoint, shard, how)

    def _result(self, message: WorkerResult, raw: Sequence[bytes]) -> Answer:
        job = self._jobs.pop(message.number, None)
        if job is None:
            raise ProtocolError(f"a result for job {message.number}, which was not given")
        work, results = job.work, job.results
        shape = (len(work.pairs), work.rows.shape[1])
        sizes = [len(frame) for frame in raw]
        expected = [] if results is not None else [shape[0] * shape[1] * 4]
        if sizes != expected:
            self._jobs[message.number] = job  # it is lost with the others
            raise ProtocolError(f"frames of {sizes} bytes for results, expected {expected}")
        # With room to spare: the clocks may be two machines'.
        if not 0 <= message.busy_s <= 1 + 2 * (time.monotonic() - job.sent_s):
            self._jobs[message.number] = job
            raise ProtocolError(f"it computed for {message.busy_s} s, it says")
        self.count.busy_s += message.busy_s
        self.count.received_bytes += shape[0] * shape[1] * 4
        if results is None:
            results = torch.frombuffer(bytearray(raw[0]), dtype=torch.float32).view(shape)
        return Answer(work.pairs, work.experts, results)

    def _send(self, work: PairRows) -> bool:
        if not self.live:
            return False
        rows, results = self._places(work)
        experts, counts = np.unique(work.experts, return_counts=True)
        self._number += 1
        job = WorkerJob(
            number=self._number,
            layer=work.layer,
            experts=experts.tolist(),
            counts=counts.tolist(),
            dtype=str(work.rows.dtype).removeprefix("torch."),
            rows_at=rows[0] if rows else None,
            results_at=results[0] if results else None,
        )
        frames: list[bytes | memoryview] = list(self._wire.encode(job))
        if rows and results:
            rows[1].copy_(work.rows)
        else:
            frames.append(work.rows.contiguous().view(torch.uint8).numpy().data)
        sent_s = time.monotonic()
        if not self._try_send(frames):
            return False
        self.count.jobs += 1
        self.count.rows += len(work.pairs)
        self.count.sent_bytes += work.rows.nbytes
        self._jobs[self._number] = _Job(work, sent_s, results[1] if results else None)
        return True

    def _places(
        self, work: PairRows
    ) -> tuple[tuple[int, Tensor] | None, tuple[int, Tensor] | None]:
        """Where rows and results lie in the shared memory; None where there is no room."""
        if self._rows is None:
            return None, None
        if not self._jobs:
            self._used_bytes = PAGE_BYTES
        shape = (len(work.pairs), work.rows.shape[1])
        start = self._used_bytes
        rows = self._rows.view(start, shape, work.rows.dtype)
        after = start + shape[0] * shape[1] * work.rows.dtype.itemsize
        results_at = -(-after // 64) * 64
        results = self._rows.view(results_at, shape, torch.float32)
        if rows is None or results is None:
            return None, None
        end = results_at + shape[0] * shape[1] * 4
        self._used_bytes = -(-end // 64) * 64
        return (start, rows), (results_at, results)

    def _try_send(self, frames: Sequence[bytes | memoryview]) -> bool:
        try:
            self._socket.messages.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True
