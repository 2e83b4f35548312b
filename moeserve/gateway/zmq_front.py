"""The ZeroMQ front: docs/protocol.md spoken over the generation service.

One ROUTER socket, one task that reads it, one task per request. Nothing here waits for a client: a
send either goes into that client's bounded queue or the request's task tries again later, and
while it does the service merges what the engine adds. So a client that never reads costs its own
answers' memory and nobody else's time; after `peer_timeout_s` it is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any

import zmq
import zmq.asyncio

from moeserve.config import ZmqConfig
from moeserve.control_messages import ControlRequest
from moeserve.core import ConfigError, ErrorCode, MoeserveError, RequestError
from moeserve.framing import ProtocolError, client_server_wire
from moeserve.gateway.curve import ClientGate, load_server_keys
from moeserve.gateway.lasting_task import LastingTask
from moeserve.gateway.service import GenerationService
from moeserve.gateway.zmq_control import ActiveControl, check_allowed, run_control
from moeserve.gateway.zmq_endpoint import check_endpoint, remove_socket_file
from moeserve.gateway.zmq_send import Sent, try_send
from moeserve.gateway.zmq_session import (
    ActiveRequest,
    CreditGate,
    LimitedLog,
    Session,
    check_credit,
    check_request_id,
    check_submit,
    chunk_message,
    done_message,
    error_message,
    generate_request,
    welcome_message,
)
from moeserve.messages import (
    Accepted,
    Cancel,
    Credit,
    FromClient,
    Hello,
    Message,
    Ping,
    Pong,
    Submit,
)

MAX_SESSIONS = 1024
#: messages queued to one client before sends wait; what the service merges meanwhile is bounded
SEND_QUEUE_MESSAGES = 256
#: messages of one client read ahead by ZeroMQ; each may have max_message_bytes
RECEIVE_QUEUE_MESSAGES = 32
#: pause before a full queue is tried again
RETRY_S = 0.02

log = logging.getLogger(__name__)


class ZmqFront:
    """Serves ZeroMQ clients at `endpoint`. Lives in one event loop.

    service: asked for per request; raises RequestError while there is none (loading, draining).
    server: name and version for the welcome.
    """

    def __init__(
        self,
        config: ZmqConfig,
        endpoint: str,
        service: Callable[[], GenerationService],
        server: str = "moeserve",
    ) -> None:
        self.endpoint = endpoint
        self._config = config
        self._service = service
        self._server = server
        self._max_silent_beats = math.ceil(config.peer_timeout_s / config.heartbeat_s)
        self._wire = client_server_wire(config.max_message_bytes)
        self._log = LimitedLog(log)
        self._sessions: dict[bytes, Session] = {}
        self._client_numbers = itertools.count(1)
        self._request_numbers = itertools.count(1)
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket
        self._gate: ClientGate | None = None
        self._tasks: list[LastingTask] = []
        self._idle = asyncio.Event()
        self._idle.set()

    # -- for the server --------------------------------------------------------------------------

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    async def start(self) -> None:
        """Binds; `endpoint` is then the real one (a port of 0 or * is resolved).

        Raises ConfigError for an endpoint that others could reach, or that is taken.
        """
        curve_dir = self._config.curve_dir
        check_endpoint(self.endpoint, has_curve=curve_dir is not None)
        keys = None if curve_dir is None else load_server_keys(curve_dir)
        socket = self._socket = self._context.socket(zmq.ROUTER)
        socket.router_mandatory = True  # a client that is gone is an error, not a silent drop
        socket.sndhwm = SEND_QUEUE_MESSAGES
        socket.rcvhwm = RECEIVE_QUEUE_MESSAGES
        socket.maxmsgsize = self._config.max_message_bytes
        socket.ipv6 = self.endpoint.startswith("tcp://[")
        if keys is not None:
            self._gate = ClientGate(self._context, keys)
            self._gate.start()
            self._gate.secure(socket)
        try:
            socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            self._close(linger_ms=0)
            text = f"endpoint: cannot bind {self.endpoint}: {error.strerror}"
            raise ConfigError(text, field="endpoint", hint="name another with --zmq") from error
        self.endpoint = socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._tasks = [
            LastingTask(self._receive, "zmq-front-receive"),
            LastingTask(self._beat, "zmq-front-beat"),
        ]
        for task in self._tasks:
            task.start()

    async def drain(self, timeout_s: float) -> bool:
        """Waits until every request has had its last message; False when that took too long."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Ends every request with an error and closes the socket."""
        for task in self._tasks:
            await task.stop()
        ended = RequestError("the server has stopped", code=ErrorCode.UNAVAILABLE)
        serving = []
        for session in self._sessions.values():
            for request in session.requests.values():
                self._send(session, error_message(request.request_id, ended))
                if request.task is not None:
                    request.task.cancel()
                    serving.append(request.task)
        await asyncio.gather(*serving, return_exceptions=True)
        if self._tasks:  # else: it never started
            remove_socket_file(self.endpoint)
            self._close(linger_ms=500)  # for the last words
            await asyncio.to_thread(self._context.term)

    def _close(self, linger_ms: int) -> None:
        if self._gate is not None:
            self._gate.stop()
        self._socket.close(linger=linger_ms)

    # -- sockets and sessions --------------------------------------------------------------------

    def _send(self, session: Session, message: Message, *raw: bytes) -> Sent:
        return try_send(self._socket, session.peer, self._wire.encode(message, *raw))

    async def _deliver(self, session: Session, message: Message, *raw: bytes) -> None:
        """Sends, waiting for room. The caller's task is cancelled when the client goes away."""
        while (sent := self._send(session, message, *raw)) is not Sent.YES:
            if sent is Sent.GONE:
                self._drop(session, "it has disconnected")
            await asyncio.sleep(RETRY_S)

    async def _receive(self) -> None:
        while True:
            peer, *frames = await self._socket.recv_multipart()
            session = self._sessions.get(peer)
            if session is not None:
                session.silent_beats = 0
            try:
                message, raw = self._wire.decode(frames)
            except ProtocolError as error:
                self._log.warning("zmq: bad message from %s: %s", peer.hex(), error)
                reply = error_message(error.request_id, error)
                try_send(self._socket, peer, self._wire.encode(reply))
            else:
                self._take(peer, session, message, raw)
            # A socket that always has more would never let the loop run anything else.
            await asyncio.sleep(0)

    def _take(
        self,
        peer: bytes,
        session: Session | None,
        message: FromClient | ControlRequest,
        raw: list[bytes],
    ) -> None:
        if isinstance(message, Hello):
            self._welcome(peer, session, message)
        elif session is None:
            self._take_stranger(peer, message)
        elif isinstance(message, Submit):
            self._submit(session, message, raw)
        elif isinstance(message, Cancel):
            if request := session.requests.get(message.request_id):
                request.cancel()
        elif isinstance(message, Credit):
            self._take_credit(session, message)
        elif isinstance(message, ControlRequest):
            self._control(session, message)
        elif isinstance(message, Ping):
            self._send(session, Pong(number=message.number))
        # What is left is Pong, which says no more than that the client lives.

    def _welcome(self, peer: bytes, session: Session | None, hello: Hello) -> None:
        if session is None:
            if len(self._sessions) >= MAX_SESSIONS:
                error = RequestError(
                    f"{MAX_SESSIONS} clients are connected already",
                    code=ErrorCode.OVERLOADED,
                    hint="try again later",
                )
                try_send(self._socket, peer, self._wire.encode(error_message(None, error)))
                return
            session = self._sessions[peer] = Session(peer, next(self._client_numbers))
            log.debug("zmq: client %d is here (%.64r)", session.number, hello.client)
        try:
            models = [self._service().info.name]
        except RequestError:
            models = []  # still loading: requests will say so
        self._send(session, welcome_message(self._config, self._server, models))

    def _take_stranger(self, peer: bytes, message: FromClient | ControlRequest) -> None:
        """Someone whose session is over, or who never said hello."""
        if isinstance(message, Ping):
            reply: Message = Pong(number=message.number, known=False)
        elif isinstance(message, Submit | ControlRequest):
            reply = error_message(message.request_id, ProtocolError("send hello first"))
        else:
            return  # about a request that is over with the session
        try_send(self._socket, peer, self._wire.encode(reply))

    def _take_credit(self, session: Session, message: Credit) -> None:
        request = session.requests.get(message.request_id)
        if not isinstance(request, ActiveRequest):
            return  # given while the end was under way
        try:
            check_credit("chunks", message.chunks)
        except RequestError as error:
            self._send(session, error_message(None, error))
        else:
            request.credit.add(message.chunks)

    async def _beat(self) -> None:
        """Pings every client; drops those that are silent, or do not read, for too long.

        Beats are counted, not seconds, so that a server that was suspended drops nobody.
        """
        number = 0
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            number += 1
            for session in list(self._sessions.values()):
                session.silent_beats += 1
                sent = self._send(session, Ping(number=number))
                session.blocked_beats = session.blocked_beats + 1 if sent is Sent.FULL else 0
                if sent is Sent.GONE:
                    self._drop(session, "it has disconnected")
                elif session.silent_beats > self._max_silent_beats:
                    self._drop(session, f"silent for {self._config.peer_timeout_s:g} s")
                elif session.blocked_beats > self._max_silent_beats:
                    self._drop(session, f"read nothing for {self._config.peer_timeout_s:g} s")

    def _drop(self, session: Session, reason: str) -> None:
        """Forgets a client; its requests are cancelled."""
        if self._sessions.pop(session.peer, None) is None:
            return
        num_requests = len(session.requests)
        log.log(
            logging.INFO if num_requests else logging.DEBUG,
            "zmq: client %d is gone: %s; %d requests cancelled",
            *(session.number, reason, num_requests),
        )
        for request in list(session.requests.values()):
            if request.task is not None:
                request.task.cancel()

    # -- requests --------------------------------------------------------------------------------

    def _submit(self, session: Session, submit: Submit, raw: list[bytes]) -> None:
        try:
            check_submit(session, submit, self._config.max_in_flight)
        except RequestError as error:
            self._send(session, error_message(submit.request_id, error))
            return
        request = ActiveRequest(submit.request_id, CreditGate(submit.credit))
        self._begin(session, request, self._serve(session, request, submit, raw))

    def _control(self, session: Session, message: ControlRequest) -> None:
        try:
            check_request_id(session, message.request_id, self._config.max_in_flight)
            check_allowed(self.endpoint, has_curve=self._config.curve_dir is not None)
        except RequestError as error:
            self._send(session, error_message(message.request_id, error))
            return
        control = ActiveControl(message.request_id)
        self._begin(session, control, self._serve_control(session, control, message))

    async def _serve_control(
        self, session: Session, control: ActiveControl, message: ControlRequest
    ) -> None:
        try:
            reply, raw = await run_control(lambda: self._service().link, control, message)
        except RequestError as error:
            reply, raw = error_message(message.request_id, error), []
        await self._deliver(session, reply, *raw)

    def _begin(
        self,
        session: Session,
        request: ActiveRequest | ActiveControl,
        work: Coroutine[Any, Any, None],
    ) -> None:
        session.requests[request.request_id] = request
        self._idle.clear()
        task = asyncio.create_task(work, name=f"zmq request {request.request_id}")
        request.task = task
        task.add_done_callback(lambda task: self._ended(session, request, task))

    async def _serve(
        self, session: Session, request: ActiveRequest, submit: Submit, raw: list[bytes]
    ) -> None:
        """One request from its submit to its last message."""
        try:
            request_id = f"zmq-{session.number}-{next(self._request_numbers)}"
            generation = await self._service().start(generate_request(submit, raw, request_id))
        except MoeserveError as error:
            await self._deliver(session, error_message(submit.request_id, error))
            return
        try:
            request.started(generation)
            prepared = generation.prepared
            accepted = Accepted(
                request_id=submit.request_id, prompt_tokens=len(prepared.prompt_token_ids)
            )
            await self._deliver(session, accepted)
            num_open = prepared.num_answers
            while num_open:
                # Credit first: what comes while we wait is merged by the service.
                await request.credit.take()
                event = await anext(generation)
                await self._deliver(session, chunk_message(submit.request_id, event))
                num_open -= event.finish_reason is not None
            await self._deliver(session, done_message(submit.request_id, generation))
        except RequestError as error:
            await self._deliver(session, error_message(submit.request_id, error))
        finally:
            generation.cancel()

    def _ended(
        self, session: Session, request: ActiveRequest | ActiveControl, task: asyncio.Task[None]
    ) -> None:
        del session.requests[request.request_id]
        if not any(other.requests for other in self._sessions.values()):
            self._idle.set()
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.error("zmq: request %s failed", request.request_id, exc_info=failure)
            error = RequestError("internal error", code=ErrorCode.INTERNAL)
            self._send(session, error_message(request.request_id, error))
