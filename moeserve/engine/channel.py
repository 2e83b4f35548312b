"""The engine's end of the wire to the gateway: one thread that owns the ZeroMQ socket.

The step loop holds the main thread for as long as a step takes; heartbeats, loading progress and
cancels must not wait for it. The two threads share a queue of commands inwards and, outwards, one
merged delta per request: a gateway that stops reading gets fewer, longer deltas later, and the
engine never holds more than the answers themselves.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import secrets
import socket
import threading
import time
from collections import deque

import msgspec
import zmq

from moeserve.control_messages import (
    ControlReply,
    EngineAnswer,
    EngineControl,
    EngineControlEnd,
)
from moeserve.core import EngineDelta, EngineStats, ModelInfo
from moeserve.framing import ProtocolError, engine_side_wire
from moeserve.messages import (
    EngineAbort,
    EngineOutput,
    EngineShutdown,
    EngineStatus,
    EngineSubmit,
    Message,
    Ping,
    Pong,
    merge_deltas,
)

#: exit status when the gateway has gone silent
EXIT_ORPHANED = 4

log = logging.getLogger(__name__)

Command = EngineSubmit | EngineAbort | EngineShutdown | EngineControl | EngineControlEnd


class EngineChannel:
    """Connects to the gateway and announces itself every `heartbeat_s`.

    max_silence_beats: the gateway pings too; that many of our own heartbeats without a word from
    it, and this process ends itself. Beats are counted rather than seconds, so that a suspended
    machine or a stopped process group does not look like a dead gateway when it wakes.
    """

    def __init__(self, endpoint: str, heartbeat_s: float, max_silence_beats: int) -> None:
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._endpoint = endpoint
        self._heartbeat_s = heartbeat_s
        self._max_silence_beats = max_silence_beats
        self._wire = engine_side_wire()
        self._lock = threading.Lock()
        self._status = EngineStatus(epoch=secrets.token_hex(8), stage="loading")
        self._status_changed = True
        self._outbox: dict[str, EngineDelta] = {}
        self._answers: deque[tuple[EngineAnswer, tuple[bytes, ...]]] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-channel", daemon=True)

    # -- the main thread's side ----------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Sends what is left and joins the thread."""
        self._closing.set()
        self._wake()
        self._thread.join()
        self._wake_read.close()
        self._wake_write.close()

    def set_stage(
        self, stage: str, detail: str = "", progress: float = 0.0, info: ModelInfo | None = None
    ) -> None:
        """Tells the gateway at once. info stays once it was given."""
        with self._lock:
            self._status = msgspec.structs.replace(
                self._status,
                stage=stage,
                detail=detail,
                progress=progress,
                info=info if info is not None else self._status.info,
            )
            self._status_changed = True
        self._wake()

    def set_trouble(self, trouble: str) -> None:
        """Tells the gateway at once why requests may fail, or with nothing that they will not."""
        with self._lock:
            self._status = msgspec.structs.replace(self._status, trouble=trouble)
            self._status_changed = True
        self._wake()

    def send(self, deltas: list[EngineDelta], stats: EngineStats) -> None:
        """Queues deltas; stats go with the next heartbeat."""
        with self._lock:
            self._status = msgspec.structs.replace(self._status, stats=stats)
            self._keep(deltas)
        if deltas:
            self._wake()

    def answer(self, number: int, reply: ControlReply, *raw: bytes) -> None:
        """Queues the answer to a control request, with its raw frames."""
        with self._lock:
            answer = EngineAnswer(epoch=self._status.epoch, number=number, reply=reply)
            self._answers.append((answer, raw))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # enough wake-ups wait already
            self._wake_write.send(b"\0")

    # -- the channel thread's side -------------------------------------------------------------

    def _keep(self, deltas: list[EngineDelta]) -> None:
        for delta in deltas:
            waiting = self._outbox.get(delta.request_id)
            merged = delta if waiting is None else merge_deltas(waiting, delta)
            self._outbox[delta.request_id] = merged

    def _run(self) -> None:
        context = zmq.Context()
        gateway = context.socket(zmq.DEALER)
        gateway.routing_id = self._status.epoch.encode()
        gateway.linger = 1000  # ms for the last words
        gateway.immediate = True  # nothing queues up for a gateway that is not there
        gateway.connect(self._endpoint)
        try:
            self._loop(gateway)
        finally:
            gateway.close()
            context.term()

    def _loop(self, gateway: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        next_beat_s = 0.0
        silent_beats = 0
        blocked = False
        while True:
            closing = self._closing.is_set()
            poller.register(gateway, zmq.POLLIN | (zmq.POLLOUT if blocked else 0))
            wait_s = 0.0 if closing else max(0.0, next_beat_s - time.monotonic())
            events = dict(poller.poll(math.ceil(wait_s * 1000)))
            if self._wake_read.fileno() in events:
                self._wake_read.recv(4096)
            if events.get(gateway, 0) & zmq.POLLIN:
                silent_beats = 0
                self._receive(gateway)
            beat = time.monotonic() >= next_beat_s
            if beat:
                next_beat_s = time.monotonic() + self._heartbeat_s
                silent_beats += 1
                if silent_beats > self._max_silence_beats:
                    self._end_orphan()
            blocked = not self._send_waiting(gateway, beat)
            if closing:
                return

    def _receive(self, gateway: zmq.Socket[bytes]) -> None:
        """Everything that has arrived."""
        while True:
            try:
                frames = gateway.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message, _ = self._wire.decode(frames)
            except ProtocolError as error:
                log.error("engine channel: %s", error)
                continue
            if isinstance(message, Ping):
                self._try_send(gateway, Pong(number=message.number))
            else:
                self.commands.put(message)

    def _send_waiting(self, gateway: zmq.Socket[bytes], beat: bool) -> bool:
        """Sends deltas, and the status if it changed or is due; False when the pipe is full."""
        with self._lock:
            status = self._status
            changed, self._status_changed = self._status_changed, False
            outbox, self._outbox = self._outbox, {}
        if outbox:
            output = EngineOutput(epoch=status.epoch, deltas=list(outbox.values()))
            if not self._try_send(gateway, output):
                with self._lock:  # older deltas go before those that came meanwhile
                    newer, self._outbox = self._outbox, outbox
                    self._keep(list(newer.values()))
                    self._status_changed |= changed
                return False
        if changed and not self._try_send(gateway, status):
            with self._lock:
                self._status_changed = True
            return False
        while self._answers:  # this thread is the only one that takes
            answer, raw = self._answers[0]
            if not self._try_send(gateway, answer, *raw):
                return False
            self._answers.popleft()
        if beat and not changed:
            self._try_send(gateway, status)
        return True

    def _try_send(self, gateway: zmq.Socket[bytes], message: Message, *raw: bytes) -> bool:
        try:
            gateway.send_multipart(self._wire.encode(message, *raw), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _end_orphan(self) -> None:
        """The main thread may be deep in a step or a load; nothing it holds is worth saving."""
        log.error("engine: the gateway has been silent too long; this engine ends itself")
        os._exit(EXIT_ORPHANED)
