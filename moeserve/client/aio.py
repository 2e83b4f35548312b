"""AsyncClient: many requests at once over one connection, in one event loop."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from moeserve.client import wire
from moeserve.client.connection import Connection
from moeserve.client.control import ControlCall, Reply
from moeserve.client.endpoint import default_endpoint, load_keys
from moeserve.client.types import (
    Chunk,
    ClientError,
    ConnectionLost,
    Logprob,
    Result,
    ServerError,
    ServerInfo,
    TimedOut,
    Timing,
    Usage,
    join_chunks,
)

Messages = Sequence[Mapping[str, str]]


class AsyncClient:
    """A client of `moeserve serve` over ZeroMQ, for one event loop.

    endpoint: ipc://PATH or tcp://HOST:PORT; default: MOESERVE_ENDPOINT, else this user's server.
    curve_dir, curve_client: CURVE keys, see moeserve.client.endpoint.load_keys.
    connect_timeout_s: how long a request waits for a server that is not there (yet).
    credit: chunks that may wait here for a slow reader; beyond that the server merges them.

    Connects on first use and reconnects by itself. Requests that were in flight when the connection
    broke raise ConnectionLost and are not sent again: the server cancels them, and only the caller
    knows whether a second run is wanted. Later requests wait for the connection.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        curve_dir: str | os.PathLike[str] | None = None,
        curve_client: str = "client",
        connect_timeout_s: float = 10.0,
        credit: int = 64,
    ) -> None:
        if credit < 1:
            raise ClientError(
                f"credit: {credit} is below 1", code="invalid_request", field="credit"
            )
        self.endpoint = default_endpoint() if endpoint is None else endpoint
        self.connect_timeout_s = connect_timeout_s
        self.credit = credit
        self._keys = None if curve_dir is None else load_keys(curve_dir, curve_client)
        self._connection: Connection | None = None
        self._closed = False
        self._streams: dict[str, AsyncStream | ControlCall] = {}
        self._id_prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what runs and disconnects. The client can not be used again."""
        self._closed = True
        for stream in list(self._streams.values()):
            if isinstance(stream, AsyncStream):
                await stream.aclose()
            else:
                stream.fail(ClientError("the client was closed meanwhile", code="cancelled"))
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def server_info(self) -> ServerInfo:
        """What the server says of itself: models, limits, heartbeats."""
        return await self._connected().server(self.connect_timeout_s)

    async def ping(self, timeout_s: float = 5.0) -> float:
        """Seconds for a message to the server and back. Raises TimedOut."""
        connection = self._connected()
        await connection.server(self.connect_timeout_s)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        await connection.ping(timeout_s)
        return loop.time() - started_s

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        model: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        add_special_tokens: bool | None = None,
        priority: int | None = None,
        deadline_s: float | None = None,
        timeout_s: float | None = None,
        **params: Any,
    ) -> AsyncStream:
        """The chunks of a new request; it is sent when the first one is asked for.

        Give exactly one of prompt, token_ids and messages ({"role", "content"} each).
        deadline_s: the server ends the answer then (finish_reason "deadline").
        timeout_s: TimedOut is raised here then, and the request is cancelled.
        params: max_tokens, temperature, top_k, top_p, min_p, stop, seed, n, logprobs, ... as in
        docs/protocol.md. Use `async with` or run the stream to its end; a stream that is only
        dropped goes on at the server.

        Raises ClientError for a prompt that is no text.
        """
        wire.check_prompt(prompt)
        fields = {
            "request_id": f"{self._id_prefix}-{next(self._numbers)}",
            "model": model,
            "prompt": prompt,
            "messages": None if messages is None else [dict(m) for m in messages],
            "token_frame": None if token_ids is None else True,
            "template_variables": None if template_variables is None else dict(template_variables),
            "add_special_tokens": add_special_tokens,
            "priority": priority,
            "deadline_ms": None if deadline_s is None else round(deadline_s * 1000),
            "credit": self.credit,
            "params": params,
        }
        raw = () if token_ids is None else (wire.pack_token_ids(token_ids),)
        return AsyncStream(self, fields, raw, timeout_s)

    async def generate(self, prompt: str | None = None, **arguments: Any) -> Result:
        """The whole result of a request; arguments as for `stream`."""
        async with self.stream(prompt, **arguments) as stream:
            return await stream.result()

    # -- for AsyncStream -------------------------------------------------------------------------

    def _connected(self) -> Connection:
        if self._closed:
            raise ClientError("the client is closed", code="invalid_request")
        if self._connection is None:
            self._connection = Connection(
                self.endpoint, self._keys, self._take_message, self._take_loss
            )
            self._connection.start()
        return self._connection

    async def control(self, kind: str, **fields: Any) -> Reply:
        """Sends a control request of docs/protocol.md, section 3; its answer. `Control` has a
        method for each. When it is cancelled, the server stops what it recorded.
        """
        call = ControlCall(f"{self._id_prefix}-{next(self._numbers)}")
        frames = wire.encode(kind, request_id=call.request_id, **fields)
        await self._submit(call, frames)
        try:
            return await call.answer
        finally:
            self._forget(call.request_id)
            if call.answer.cancelled():
                self._send(wire.encode("cancel", request_id=call.request_id))

    async def _submit(self, stream: AsyncStream | ControlCall, frames: list[bytes]) -> None:
        connection = self._connected()
        info = await connection.server(self.connect_timeout_s)
        size_bytes = sum(map(len, frames))
        if size_bytes > info.max_message_bytes:
            raise ClientError(
                f"message: {size_bytes} bytes, the server takes {info.max_message_bytes}",
                code="request_too_large",
                hint="send a shorter prompt",
            )
        if not connection.send(frames):
            raise ConnectionLost(f"the connection to {self.endpoint} broke")
        self._streams[stream.request_id] = stream

    def _send(self, frames: list[bytes]) -> None:
        if self._connection is not None:
            self._connection.send(frames)

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def _take_message(self, header: wire.Header, raw: list[bytes]) -> None:
        stream = self._streams.get(header.get("request_id", ""))
        if isinstance(stream, AsyncStream):
            stream.take(header)
        elif stream is not None:  # else: late words about a request we gave up
            stream.take(header, raw)

    def _take_loss(self, error: ClientError) -> None:
        for stream in list(self._streams.values()):
            stream.fail(error)


class AsyncStream:
    """One request: an async iterator of chunks. Leaving `async with` cancels what is left.

    prompt_tokens is set once the server has accepted; usage, timing and prompt_logprobs at the end.
    """

    def __init__(
        self,
        client: AsyncClient,
        fields: dict[str, Any],
        raw: tuple[bytes, ...],
        timeout_s: float | None,
    ) -> None:
        self.request_id: str = fields["request_id"]
        self.prompt_tokens: int | None = None
        self.usage: Usage | None = None
        self.timing: Timing | None = None
        self.prompt_logprobs: tuple[Logprob, ...] | None = None
        self._client = client
        self._frames = wire.encode("submit", *raw, **fields)
        self._timeout_s = timeout_s
        self._expires_s: float | None = None
        self._started = False
        self._over = False
        self._num_taken = 0
        # At most `credit` chunks and the end: the server waits for credit before it sends more.
        self._arrived: asyncio.Queue[Chunk | ClientError | None] = asyncio.Queue()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await self.next_or_none()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def next_or_none(self) -> Chunk | None:
        """The next chunk; None after the last. Raises ServerError, ConnectionLost, TimedOut."""
        if self._over:
            return None
        try:
            item = await asyncio.wait_for(self._next(), self._remaining_s())
        except asyncio.TimeoutError:
            await self.aclose()
            raise TimedOut(f"no complete answer within {self._timeout_s:g} s") from None
        if isinstance(item, Chunk):
            self._give_credit()
            return item
        if item is None or isinstance(item, ServerError):
            self._end()
        else:
            await self.aclose()  # the server may not know that it is over
        if item is not None:
            raise item
        return None

    async def result(self) -> Result:
        """Reads to the end. Chunks taken before are missing from the result."""
        parts: dict[int, list[Chunk]] = {}
        async for chunk in self:
            parts.setdefault(chunk.index, []).append(chunk)
        if self.usage is None or self.timing is None:
            raise ClientError("the stream was closed before its end", code="cancelled")
        answers = tuple(join_chunks(parts[index]) for index in sorted(parts))
        return Result(answers, self.usage, self.timing, self.prompt_logprobs)

    async def cancel(self) -> None:
        """Asks the server to end the request; the iteration ends when it has."""
        if self._started and not self._over:
            self._client._send(wire.encode("cancel", request_id=self.request_id))
        else:
            self._end()

    async def aclose(self) -> None:
        """Cancels what is left and reads no more."""
        if self._started and not self._over:
            self._end()
            self._client._send(wire.encode("cancel", request_id=self.request_id))
        self._end()

    async def _next(self) -> Chunk | ClientError | None:
        if not self._started:
            await self._client._submit(self, self._frames)
            self._started = True
            self._frames = []
        return await self._arrived.get()

    def _remaining_s(self) -> float | None:
        if self._timeout_s is None:
            return None
        now_s = asyncio.get_running_loop().time()
        if self._expires_s is None:
            self._expires_s = now_s + self._timeout_s
        return max(0.0, self._expires_s - now_s)

    def _give_credit(self) -> None:
        self._num_taken += 1
        if self._num_taken >= max(1, self._client.credit // 2):
            chunks, self._num_taken = self._num_taken, 0
            credit = wire.encode("credit", request_id=self.request_id, chunks=chunks)
            self._client._send(credit)

    def _end(self) -> None:
        self._over = True
        self._client._forget(self.request_id)

    # -- what the connection brings --------------------------------------------------------------

    def take(self, header: wire.Header) -> None:
        kind = header["type"]
        if kind == "chunk":
            self._arrived.put_nowait(wire.read_chunk(header))
        elif kind == "accepted":
            self.prompt_tokens = header["prompt_tokens"]
        elif kind == "done":
            self.usage, self.timing, self.prompt_logprobs = wire.read_done(header)
            self._arrived.put_nowait(None)
        elif kind == "error":
            error = ServerError(
                header["message"],
                code=header["code"],
                field=header.get("field"),
                hint=header.get("hint"),
            )
            self.fail(error)

    def fail(self, error: ClientError) -> None:
        self._arrived.put_nowait(error)
