"""The gateway's end of the wire to the engine process: implements EngineLink over ZeroMQ.

The gateway binds a ROUTER, the engine connects with its epoch as routing id. So a message can only
reach the engine process it was meant for: one addressed to a dead engine fails instead of ending up
in its successor's queue.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable

import zmq
import zmq.asyncio

from moeserve.control_messages import (
    ControlReply,
    ControlRequest,
    EngineAnswer,
    EngineControl,
    EngineControlEnd,
)
from moeserve.core import EngineDelta, EngineRequest, ErrorCode, FinishReason, RequestError
from moeserve.framing import ProtocolError, gateway_side_wire
from moeserve.gateway.lasting_task import LastingTask
from moeserve.gateway.zmq_endpoint import remove_socket_file
from moeserve.gateway.zmq_send import Sent, try_send
from moeserve.messages import (
    EngineAbort,
    EngineOutput,
    EngineShutdown,
    EngineStatus,
    EngineSubmit,
    Message,
    Ping,
    merge_deltas,
)

log = logging.getLogger(__name__)


class ZmqEngineStream:
    """The deltas of one request. At most one waits: later ones are merged into it."""

    def __init__(self) -> None:
        self._waiting: EngineDelta | None = None
        self._arrived = asyncio.Event()

    def push(self, delta: EngineDelta) -> None:
        waiting = self._waiting
        self._waiting = delta if waiting is None else merge_deltas(waiting, delta)
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[EngineDelta]:
        finished = False
        while not finished:
            await self._arrived.wait()
            self._arrived.clear()
            delta, self._waiting = self._waiting, None
            assert delta is not None  # the event is set by push alone
            finished = delta.finish_reason is not None
            yield delta


class ZmqControlCall:
    """A control request on its way; forgotten by the link when it has been answered."""

    def __init__(self, send_end: Callable[[], object]) -> None:
        self._send_end = send_end
        self.reply: asyncio.Future[tuple[ControlReply, list[bytes]]] = (
            asyncio.get_running_loop().create_future()
        )

    async def answer(self) -> tuple[ControlReply, list[bytes]]:
        # A reader that is cancelled must not cancel the future that the link still holds.
        return await asyncio.shield(self.reply)

    def end(self) -> None:
        if not self.reply.done():
            self._send_end()


class ZmqEngineLink:
    """EngineLink to whichever engine process is connected. Lives in one event loop.

    silent: set when a connected engine has been quiet for `max_silence_beats` heartbeats; the
    supervisor then ends that process. Beats are counted, not seconds: see EngineChannel.
    """

    def __init__(
        self, endpoint: str, heartbeat_s: float = 1.0, max_silence_beats: int = 30
    ) -> None:
        self.endpoint = endpoint
        self.heartbeat_s = heartbeat_s
        self.max_silence_beats = max_silence_beats
        self.silent = asyncio.Event()
        self._status = EngineStatus(epoch="", stage="loading", detail="not started")
        self._status_changed = asyncio.Event()
        self._past_epochs: set[str] = set()
        self._streams: dict[str, ZmqEngineStream] = {}
        self._calls: dict[int, ZmqControlCall] = {}
        self._numbers = itertools.count(1)
        self._silent_beats = 0
        self._wire = gateway_side_wire()
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket
        self._tasks: list[LastingTask] = []

    # -- EngineLink ------------------------------------------------------------------------------

    @property
    def status(self) -> EngineStatus:
        return self._status

    def submit(self, request: EngineRequest) -> ZmqEngineStream:
        """Sends a request. Raises RequestError(UNAVAILABLE) when no engine is ready."""
        self._send_if_ready(EngineSubmit(request=request))
        assert request.request_id not in self._streams, "the service keeps its ids unique"
        stream = self._streams[request.request_id] = ZmqEngineStream()
        return stream

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Ends a request early; its stream still ends with a delta. Unknown ids are ignored."""
        if request_id in self._streams:
            self._send(EngineAbort(request_id=request_id, reason=reason))

    def control(self, request: ControlRequest) -> ZmqControlCall:
        """Sends a control request. Raises RequestError(UNAVAILABLE) when no engine is ready."""
        number = next(self._numbers)
        self._send_if_ready(EngineControl(number=number, request=request))
        call = ZmqControlCall(lambda: self._send(EngineControlEnd(number=number)))
        self._calls[number] = call
        return call

    # -- for the supervisor ----------------------------------------------------------------------

    async def start(self) -> None:
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.router_mandatory = True
        self._socket.linger = 0
        # Bounded elsewhere: inwards by the requests the fronts admit, outwards by merging.
        self._socket.set_hwm(0)
        self._socket.bind(self.endpoint)
        self._tasks = [
            LastingTask(self._receive, "engine-link-receive"),
            LastingTask(self._beat, "engine-link-beat"),
        ]
        for task in self._tasks:
            task.start()

    async def stop(self) -> None:
        self.mark_down("stopping", "the server stops")
        for task in self._tasks:
            await task.stop()
        if self._tasks:  # else: it never started
            remove_socket_file(self.endpoint)
            self._socket.close()
            self._context.term()

    def mark_down(self, stage: str, detail: str) -> None:
        """No engine runs (any more): its requests fail, and `status` says why."""
        self._past_epochs.add(self._status.epoch)
        self._silent_beats = 0
        self.silent.clear()
        self._set_status(EngineStatus(epoch="", stage=stage, detail=detail))
        self._fail_streams(detail)

    def ask_to_stop(self) -> None:
        self._send(EngineShutdown())

    async def wait_for(self, wanted: Callable[[EngineStatus], bool]) -> EngineStatus:
        """The first status from now on that is as wanted."""
        while not wanted(self._status):
            self._status_changed.clear()
            await self._status_changed.wait()
        return self._status

    # -- the socket ------------------------------------------------------------------------------

    def _send_if_ready(self, message: Message) -> None:
        status = self._status
        if status.stage != "ready" or not self._send(message):
            detail = f" ({status.detail})" if status.detail else ""
            stage = "its process has just ended" if status.stage == "ready" else status.stage
            raise RequestError(
                f"the engine is not ready: {stage}{detail}", code=ErrorCode.UNAVAILABLE
            )

    def _send(self, message: Message) -> bool:
        """False when the engine of the current epoch is gone."""
        peer = self._status.epoch.encode()
        return try_send(self._socket, peer, self._wire.encode(message)) is Sent.YES

    async def _receive(self) -> None:
        while True:
            sender, *frames = await self._socket.recv_multipart()
            try:
                message, raw = self._wire.decode(frames)
            except ProtocolError as error:
                log.error("engine link: %s", error)
                continue
            if isinstance(message, EngineStatus) and message.epoch.encode() == sender:
                self._take_status(message)
            elif sender == self._status.epoch.encode():
                self._silent_beats = 0
                if isinstance(message, EngineOutput):
                    self._deliver(message.deltas)
                elif isinstance(message, EngineAnswer):
                    self._answer_call(message, raw)
            # Let the readers run: a socket that always has more never yields by itself.
            await asyncio.sleep(0)

    async def _beat(self) -> None:
        number = 0
        while True:
            await asyncio.sleep(self.heartbeat_s)
            if not self._status.epoch:
                continue
            number += 1
            self._silent_beats += 1
            self._send(Ping(number=number))
            if self._silent_beats > self.max_silence_beats:
                self.silent.set()

    def _take_status(self, status: EngineStatus) -> None:
        if status.epoch in self._past_epochs:
            return  # read late from the pipe of an engine that is gone
        if status.epoch != self._status.epoch:
            self._past_epochs.add(self._status.epoch)
            self._fail_streams("the engine was restarted")
        self._silent_beats = 0
        self._set_status(status)
        if status.stage in ("failed", "stopping"):
            self._fail_streams(f"the engine is {status.stage}: {status.detail}")

    def _set_status(self, status: EngineStatus) -> None:
        self._status = status
        self._status_changed.set()

    def _deliver(self, deltas: list[EngineDelta]) -> None:
        for delta in deltas:
            finished = delta.finish_reason is not None
            stream = (self._streams.pop if finished else self._streams.get)(delta.request_id, None)
            if stream is not None:
                stream.push(delta)

    def _answer_call(self, message: EngineAnswer, raw: list[bytes]) -> None:
        if call := self._calls.pop(message.number, None):
            call.reply.set_result((message.reply, raw))

    def _fail_streams(self, detail: str) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            gone = RequestError(f"the engine is gone: {detail}", code=ErrorCode.UNAVAILABLE)
            call.reply.set_exception(gone)
            call.reply.exception()  # nobody has to be waiting
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            stream.push(
                EngineDelta(
                    request_id=request_id,
                    finish_reason=FinishReason.ERROR,
                    error=f"the engine is gone: {detail}",
                    error_code=ErrorCode.UNAVAILABLE,
                )
            )
