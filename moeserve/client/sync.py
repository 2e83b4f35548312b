"""Client: the same as AsyncClient for code without an event loop. Thread-safe."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from moeserve.client.aio import AsyncClient, AsyncStream
from moeserve.client.control import Reply
from moeserve.client.types import Chunk, ClientError, Logprob, Result, ServerInfo, Timing, Usage

T = TypeVar("T")


class Client:
    """A client of `moeserve serve` over ZeroMQ; arguments and reconnecting as for AsyncClient.

    One background thread does all input and output, so any number of threads may share a client
    and have requests in flight at once.
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
        self._client = AsyncClient(
            endpoint,
            curve_dir=curve_dir,
            curve_client=curve_client,
            connect_timeout_s=connect_timeout_s,
            credit=credit,
        )
        self.endpoint = self._client.endpoint
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="moeserve-client", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what runs and disconnects. The client can not be used again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def server_info(self) -> ServerInfo:
        """What the server says of itself: models, limits, heartbeats."""
        return self._call(self._client.server_info())

    def ping(self, timeout_s: float = 5.0) -> float:
        """Seconds for a message to the server and back. Raises TimedOut."""
        return self._call(self._client.ping(timeout_s))

    def stream(
        self, prompt: str | None = None, *, token_ids: Sequence[int] | None = None, **arguments: Any
    ) -> Stream:
        """The chunks of a new request; arguments as for AsyncClient.stream."""
        return Stream(self, self._client.stream(prompt, token_ids=token_ids, **arguments))

    def generate(
        self, prompt: str | None = None, *, token_ids: Sequence[int] | None = None, **arguments: Any
    ) -> Result:
        """The whole result of a request; arguments as for AsyncClient.stream."""
        with self.stream(prompt, token_ids=token_ids, **arguments) as stream:
            return stream.result()

    def control(self, kind: str, **fields: Any) -> Reply:
        """Sends a control request; see moeserve.client.control.Control."""
        return self._call(self._client.control(kind, **fields))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs it on the client's thread; Ctrl-C here ends it there."""
        with self._lock:
            if self._closed:
                work.close()
                raise ClientError("the client is closed", code="invalid_request")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise ClientError("the client was closed meanwhile", code="cancelled") from None
        finally:
            future.cancel()


class Stream:
    """One request: an iterator of chunks. Closing it, or leaving `with`, cancels what is left.

    The attributes are those of AsyncStream. One thread at a time may iterate; any may cancel.
    """

    def __init__(self, client: Client, stream: AsyncStream) -> None:
        self._client = client
        self._stream = stream

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = self._client._call(self._stream.next_or_none())
        if chunk is None:
            raise StopIteration
        return chunk

    def result(self) -> Result:
        """Reads to the end. Chunks taken before are missing from the result."""
        return self._client._call(self._stream.result())

    def cancel(self) -> None:
        """Asks the server to end the request; the iteration ends when it has."""
        self._client._call(self._stream.cancel())

    def close(self) -> None:
        """Cancels what is left and reads no more."""
        with contextlib.suppress(ClientError):  # a closed client has cancelled it already
            self._client._call(self._stream.aclose())

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    @property
    def prompt_tokens(self) -> int | None:
        return self._stream.prompt_tokens

    @property
    def usage(self) -> Usage | None:
        return self._stream.usage

    @property
    def timing(self) -> Timing | None:
        return self._stream.timing

    @property
    def prompt_logprobs(self) -> tuple[Logprob, ...] | None:
        return self._stream.prompt_logprobs
