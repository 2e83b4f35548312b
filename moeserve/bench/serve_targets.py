"""Servers that a workload is replayed against: one request, and when its tokens came."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Protocol

import httpx

from moeserve.client.aio import AsyncClient
from moeserve.client.types import ClientError
from moeserve.core import MoeserveError

#: an answer may take as long as it takes; a connection may not
CONNECT_S = 10.0


class RequestFailed(MoeserveError):
    """What a server made of one request; the others go on."""


class Target(Protocol):
    """A server. An async context manager."""

    name: str

    async def check(self) -> None:
        """Raises MoeserveError where there is no server."""
        ...

    def answer(self, token_ids: list[int], num_output: int) -> AsyncIterator[tuple[float, int]]:
        """(time.perf_counter(), tokens so far) whenever some came. Raises RequestFailed."""
        ...

    async def __aenter__(self) -> Target: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class ZmqTarget:
    """`moeserve serve` by its own protocol."""

    def __init__(self, endpoint: str | None) -> None:
        """None: MOESERVE_ENDPOINT, else this user's server."""
        self._client = AsyncClient(endpoint)
        self.name = self._client.endpoint

    async def __aenter__(self) -> ZmqTarget:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def check(self) -> None:
        try:
            await self._client.server_info()
        except ClientError as error:
            raise MoeserveError(str(error), field="zmq") from error

    async def answer(
        self, token_ids: list[int], num_output: int
    ) -> AsyncIterator[tuple[float, int]]:
        count = 0
        try:
            async with self._client.stream(
                token_ids=token_ids, max_tokens=num_output, temperature=0.0, ignore_eos=True
            ) as stream:
                async for chunk in stream:
                    count += len(chunk.token_ids)
                    yield time.perf_counter(), count
        except ClientError as error:
            raise RequestFailed(str(error)) from error


class HttpTarget:
    """A server of the OpenAI API whose completions take token ids and `ignore_eos`."""

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        """model: the name that requests give; None: the first that the server lists."""
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.name = url.rstrip("/")
        self._model = model
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> HttpTarget:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def check(self) -> None:
        try:
            found = await self._client.get(f"{self.name}/v1/models")
            found.raise_for_status()
            if self._model is None:
                self._model = str(found.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise MoeserveError(
                f"url: {self.name}/v1/models: {error or type(error).__name__}",
                field="url",
                hint="name a running server, as http://127.0.0.1:8000",
            ) from error

    async def answer(
        self, token_ids: list[int], num_output: int
    ) -> AsyncIterator[tuple[float, int]]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": token_ids,
            "max_tokens": num_output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        count = 0
        url = f"{self.name}/v1/completions"
        try:
            async with self._client.stream("POST", url, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    said = (await response.aread()).decode(errors="replace")
                    raise RequestFailed(f"{response.status_code}: {said[:500]}")
                async for line in response.aiter_lines():
                    event = _event(line)
                    if event is None:
                        continue
                    if "error" in event:
                        raise RequestFailed(json.dumps(event["error"])[:500])
                    usage = event.get("usage")
                    count = usage["completion_tokens"] if usage else count + 1
                    if event.get("choices"):
                        yield time.perf_counter(), min(count, num_output)
            yield time.perf_counter(), count
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error


def _event(line: str) -> dict[str, Any] | None:
    """Of one line of server-sent events; None for all but data."""
    if not line.startswith("data:") or line.endswith("[DONE]"):
        return None
    event: dict[str, Any] = json.loads(line.removeprefix("data:"))
    return event
