"""One connection: hello and welcome, heartbeats, noticing that the server went or came back."""

from __future__ import annotations

import asyncio
import math
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, cast

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from moeserve.client import wire
from moeserve.client.endpoint import CurveKeys
from moeserve.client.types import ClientError, ConnectionLost, ServerInfo, TimedOut

#: before the welcome has said better
HEARTBEAT_MS = 500

_REFUSED: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the server does not know this client's key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the security handshake failed",
}


class Connection:
    """Speaks to one endpoint from one event loop. ZeroMQ reconnects; this class starts anew then.

    on_message: gets the header and the raw frames of every message about a request.
    on_lost: gets the reason whenever the server is gone; all requests are over then.
    """

    def __init__(
        self,
        endpoint: str,
        keys: CurveKeys | None,
        on_message: Callable[[wire.Header, list[bytes]], None],
        on_lost: Callable[[ClientError], None],
    ) -> None:
        self.endpoint = endpoint
        self._keys = keys
        self._on_message = on_message
        self._on_lost = on_lost
        self._server: asyncio.Future[ServerInfo] = asyncio.get_running_loop().create_future()
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._num_pings = 0
        self._silent_beats = 0
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
        self._monitor: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        socket = self._socket
        socket.linger = 200  # ms for last cancels
        socket.immediate = True  # nothing queues up for a server that is not there
        socket.sndhwm = 0  # bounded by the requests the caller has in flight
        socket.reconnect_ivl = 100
        socket.reconnect_ivl_max = 2000
        if self.endpoint.startswith("tcp://["):
            socket.ipv6 = True
        if self._keys is not None:
            socket.curve_publickey = self._keys.public
            socket.curve_secretkey = self._keys.secret
            socket.curve_serverkey = self._keys.server
        self._monitor = socket.get_monitor_socket()
        # At exit the process takes everything with it, running threads or not.
        weakref.finalize(self, _abandon, self._context, socket, self._monitor).atexit = False
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            raise ClientError(
                f"endpoint: cannot connect to {self.endpoint!r}: {error}",
                code="invalid_request",
                field="endpoint",
                hint="expected ipc://PATH or tcp://HOST:PORT",
            ) from error
        self._run(self._receive())
        self._run(self._watch(self._monitor))
        self._run(self._beat())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.disable_monitor()
        if self._monitor is not None:
            self._monitor.close(linger=0)
        self._socket.close()
        # Waits for `linger` at most; other tasks of the loop go on meanwhile.
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)

    async def server(self, timeout_s: float) -> ServerInfo:
        """What the server said of itself, once it is there. Raises TimedOut, ClientError."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._server), timeout_s)
        except asyncio.TimeoutError:
            raise TimedOut(
                f"no server answered at {self.endpoint} within {timeout_s:g} s",
                hint="is `moeserve serve` running there"
                + (", with these keys?" if self._keys is not None else "?"),
            ) from None

    def send(self, frames: list[bytes]) -> bool:
        """Queues a message; False when there is no connection, which ends every request anyway."""
        attempt = self._socket.send_multipart(frames, zmq.NOBLOCK)
        # pyzmq resolves the future of a NOBLOCK send before it returns it (zmq/_future.py).
        error = cast("asyncio.Future[Any]", attempt).exception()
        if error is not None and not isinstance(error, zmq.Again):
            raise error
        return error is None

    def _hello(self) -> None:
        self.send(wire.encode("hello", client="moeserve-python"))

    async def ping(self, timeout_s: float) -> None:
        """Returns when the server has answered. Raises TimedOut."""
        self._num_pings += 1
        number = self._num_pings
        answered = self._pings[number] = asyncio.get_running_loop().create_future()
        try:
            self.send(wire.encode("ping", number=number))
            await asyncio.wait_for(answered, timeout_s)
        except asyncio.TimeoutError:
            raise TimedOut(f"no pong from {self.endpoint} within {timeout_s:g} s") from None
        finally:
            del self._pings[number]

    # -- tasks -----------------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        """Says hello on every new connection; the rest of the session follows from it."""
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._hello()
            elif event == zmq.EVENT_DISCONNECTED:
                self._lose(ConnectionLost(f"the connection to {self.endpoint} broke"))
            elif event in _REFUSED:
                self._refuse(ClientError(_REFUSED[event], code="unauthorized"))

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            self._silent_beats = 0
            try:
                self._take(wire.decode(frames), wire.raw_frames(frames))
            except ClientError as error:
                self._refuse(error)
            except (KeyError, TypeError, ValueError) as error:
                reason = f"the server sent a malformed message: {error!r}"
                self._lose(ClientError(reason, code="protocol_error"))

    def _take(self, header: wire.Header, raw: list[bytes]) -> None:
        kind = header["type"]
        if kind == "welcome":
            self._renew()
            self._server.set_result(wire.read_welcome(header))
        elif kind == "ping":
            self.send(wire.encode("pong", number=header.get("number", 0)))
        elif kind == "pong":
            self._take_pong(header)
        elif kind == "error" and header.get("request_id") is None:
            error = ClientError(header["message"], code=header["code"], hint=header.get("hint"))
            self._refuse(error)
        else:
            self._on_message(header, raw)

    def _take_pong(self, header: wire.Header) -> None:
        answered = self._pings.get(header.get("number", 0))
        if answered is not None and not answered.done():
            answered.set_result(None)
        if not header.get("known", True) and self._server.done():
            self._lose(ConnectionLost("the server has forgotten this client (a restart?)"))
            self._hello()

    async def _beat(self) -> None:
        heartbeat_ms = HEARTBEAT_MS
        while True:
            await asyncio.sleep(heartbeat_ms / 1000)
            info = self._info()
            if info is None:
                self._hello()
                continue
            heartbeat_ms = info.heartbeat_ms
            # Beats are counted, not seconds: a suspended machine is no silent server.
            self._silent_beats += 1
            if self._silent_beats > math.ceil(info.timeout_ms / info.heartbeat_ms):
                self._lose(ConnectionLost(f"{self.endpoint} was silent for {info.timeout_ms} ms"))
                self._socket.disconnect(self.endpoint)
                self._socket.connect(self.endpoint)
                continue
            self._num_pings += 1
            self.send(wire.encode("ping", number=self._num_pings))

    def _info(self) -> ServerInfo | None:
        server = self._server
        known = server.done() and not server.cancelled() and server.exception() is None
        return server.result() if known else None

    def _lose(self, error: ClientError) -> None:
        """The session is over; the next welcome starts another one."""
        self._silent_beats = 0
        self._renew()
        self._on_lost(error)

    def _renew(self) -> None:
        if self._server.done():
            self._server = asyncio.get_running_loop().create_future()

    def _refuse(self, error: ClientError) -> None:
        """The server will not have us: those who wait for a welcome get the reason."""
        if not self._server.done():
            self._server.set_exception(error)
            self._server.exception()  # nobody has to be waiting
        self._on_lost(error)


def _abandon(context: zmq.asyncio.Context, *sockets: zmq.asyncio.Socket) -> None:
    """Closes what a client left open that was dropped: its context would wait for it for ever."""
    for socket in sockets:
        socket.close(linger=0)
    context.term()
