"""Answers that take a while: server-sent events, and stopping work when the client leaves.

Both kinds of answer run beside a watch on `receive`: uvicorn reports a closed connection there,
also while nothing has been sent yet (during prefill) and for answers that do not stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import Any, Final, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moeserve.core import MoeserveError
from moeserve.gateway.errors import CLIENT_CLOSED_REQUEST, ApiError

T = TypeVar("T")

#: silence after which a comment is sent, so that proxies keep the connection open
KEEP_ALIVE_S: Final = 15.0

DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"


def sse(body: object, event: str | None = None) -> bytes:
    """One server-sent event with a JSON body (https://html.spec.whatwg.org/#server-sent-events)."""
    head = b"" if event is None else f"event: {event}\n".encode()
    return head + b"data: " + msgspec.json.encode(body) + b"\n\n"


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled and awaited when the client leaves.

    Raises ApiError(499) then, an answer that nobody reads. Whatever `work` raises comes through.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client closed the connection")
    finally:
        await cancel_and_wait(task)
        await cancel_and_wait(gone)


async def cancel_and_wait(task: asyncio.Future[Any]) -> None:
    """Ends a task and waits until its cleanup ran; what it raised is the caller's business."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # marks it as seen


class EventStreamResponse(Response):
    """Streams encoded events; ends the generator, wherever it is, when the client leaves.

    The status line waits for the first event (or the first keep-alive), so that an early failure
    has a status of its own. A later one becomes an event named `error` with the OpenAI error
    object, and no `[DONE]` follows it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache"})
        del self.headers["content-length"]
        self.events = events
        self.keep_alive_s = keep_alive_s
        self._started = False
        self._idle = True
        self._writing = asyncio.Lock()  # the events and the keep-alive both write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self.events):
                await unless_disconnected(receive, self._stream(send))
        except (ApiError, MoeserveError) as failure:
            error = failure if isinstance(failure, ApiError) else ApiError.of(failure)
            if error.status == CLIENT_CLOSED_REQUEST:
                return
            if self._started:
                await self._write(send, sse(error.body, event="error"), last=True)
            else:
                await error.response()(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        ticker = asyncio.ensure_future(self._keep_alive(send))
        try:
            async for event in self.events:
                await self._write(send, event)
            await self._write(send, DONE, last=True)
        finally:
            await cancel_and_wait(ticker)

    async def _keep_alive(self, send: Send) -> None:
        while True:
            self._idle = True
            await asyncio.sleep(self.keep_alive_s)
            if self._idle:
                await self._write(send, KEEP_ALIVE)

    async def _write(self, send: Send, body: bytes, last: bool = False) -> None:
        self._idle = False
        async with self._writing:
            if not self._started:
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
                self._started = True
            await send({"type": "http.response.body", "body": body, "more_body": not last})
