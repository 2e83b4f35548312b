"""One HTTP connection: uvicorn's h11 protocol, with a limit on the time that a request may arrive.

Without one, a client that sends a byte now and then holds a connection for good: uvicorn has no
timer before the first request, none while a head arrives, and none for the rest of a body that was
answered early (401, 413). `RequestSizeLimits` answers a slow body that a handler waits for; here
is what no handler ever sees.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any, Final

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from moeserve.gateway.errors import of_status

#: an answer is under way (the middleware's 408, as a rule): so long until we look again
ANSWER_S: Final = 5.0


class TimedConnection(H11Protocol):
    """Closes the connection when a head, or the body after it, is longer under way than allowed.

    Time while we work on an answer, or while it is read, does not count. Between two requests
    uvicorn's own limit holds (5 s without a byte).
    """

    receive_timeout_s: float  # of a head; of a body after it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        #: what the timer is for: the part of the request that is under way, and of which request
        self._awaited: tuple[object, object] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are no HTTP."""
        self._refuse(400, msg)

    def _watch(self) -> None:
        """Starts the timer for the part that is awaited, once; stops it when there is none."""
        part = self.conn.their_state
        if part not in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
            self._stop_timer()
            return
        awaited = (part, self.cycle)  # every request has a cycle of its own
        if awaited == self._awaited:
            return
        self._stop_timer()
        self._awaited = awaited
        self._timer = self.loop.call_later(self.receive_timeout_s, self._too_slow)

    def _stop_timer(self) -> None:
        self._awaited = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        if self.conn.their_state is h11.SEND_BODY and not self.cycle.response_complete:
            self._timer = self.loop.call_later(ANSWER_S, self._too_slow)
            return
        begun, _ = self.conn.trailing_data
        if begun and self.conn.their_state is h11.IDLE:
            text = f"head: it was not complete after {self.receive_timeout_s:g} s"
            self._refuse(408, text)
        self.transport.close()

    def _refuse(self, status: int, text: str) -> None:
        """An error in the usual shape, for what never became a request; ends the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no answer has begun
            body = msgspec.json.encode(of_status(status, text).body)
            reason = HTTPStatus(status).phrase.encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            for event in (
                h11.Response(status_code=status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def timed_connection(receive_timeout_s: float) -> type[TimedConnection]:
    """The protocol with that limit, as a class, which is what uvicorn wants."""
    return type("TimedConnection", (TimedConnection,), {"receive_timeout_s": receive_timeout_s})
