"""Where answers come from: a model in this process, a server over HTTP, a server over ZeroMQ."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias
from urllib.parse import urlsplit

import httpx

from moeserve.client import Client, ClientError
from moeserve.config import EngineConfig
from moeserve.core import ConfigError, ErrorCode, MoeserveError
from moeserve.progress import LoadingBar


@dataclass(frozen=True)
class Piece:
    """More of an answer. num_tokens: generated so far, where the source says it."""

    text: str
    num_tokens: int | None = None
    finish_reason: str | None = None


Message: TypeAlias = Mapping[str, str]  # role, content
PieceStream: TypeAlias = Generator[Piece, None, None]


class Backend(Protocol):
    """One place to ask. Closing a stream early (or interrupting it) cancels the answer."""

    name: str

    def stream(self, messages: Sequence[Message], params: Mapping[str, Any]) -> PieceStream:
        """Pieces of the answer to the last message. Raises MoeserveError."""
        ...

    def close(self) -> None: ...


class LocalBackend:
    """The engine in this process."""

    def __init__(self, config: EngineConfig) -> None:
        # Imported here: only this backend needs torch, and a chat with a server starts at once.
        from moeserve.llm import LLM

        with LoadingBar() as bar:
            self._llm = LLM.from_config(config, bar)
        self.name = config.model.name

    def stream(self, messages: Sequence[Message], params: Mapping[str, Any]) -> PieceStream:
        num_tokens = 0
        for event in self._llm.stream(messages, params):
            num_tokens += len(event.token_ids)
            reason = event.finish_reason.value if event.finish_reason else None
            yield Piece(event.text, num_tokens, reason)

    def close(self) -> None:
        self._llm.close()


class ZmqBackend:
    """A moeserve server over ZeroMQ."""

    def __init__(self, endpoint: str, curve_dir: str | None) -> None:
        with _client_errors():
            self._client = Client(endpoint, curve_dir=curve_dir)
            try:
                self.name = self._client.server_info().models[0]
            except ClientError:
                self._client.close()
                raise

    def stream(self, messages: Sequence[Message], params: Mapping[str, Any]) -> PieceStream:
        num_tokens = 0
        with _client_errors(), self._client.stream(messages=messages, **params) as chunks:
            for chunk in chunks:
                num_tokens += len(chunk.token_ids)
                yield Piece(chunk.text, num_tokens, chunk.finish_reason)

    def close(self) -> None:
        self._client.close()


@contextmanager
def _client_errors() -> Iterator[None]:
    """The client knows nothing of moeserve's errors; the chat knows only those."""
    try:
        yield
    except ClientError as error:
        raise MoeserveError(str(error), code=ErrorCode(error.code), field=error.field) from error


class HttpBackend:
    """Any server with the OpenAI chat API."""

    def __init__(self, url: str, api_key: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(
                f"url: {url!r} is no HTTP address", field="url", hint="as http://127.0.0.1:8000"
            )
        base = url.rstrip("/").removesuffix("/v1") + "/v1/"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # No read timeout: a long prompt on a slow machine is no error, and Ctrl-C ends the wait.
        timeout = httpx.Timeout(10.0, read=None)
        self._http = httpx.Client(base_url=base, headers=headers, timeout=timeout, trust_env=False)
        try:
            self.name = self._first_model()
        except httpx.HTTPError as error:
            self._http.close()
            raise _unreachable(url, error) from error

    def _first_model(self) -> str:
        answer = self._http.get("models")
        _raise_for(answer)
        return str(answer.json()["data"][0]["id"])

    def stream(self, messages: Sequence[Message], params: Mapping[str, Any]) -> PieceStream:
        body = {
            "model": self.name,
            "messages": [dict(m) for m in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **params,
        }
        try:
            with self._http.stream("POST", "chat/completions", json=body) as answer:
                if answer.is_error:
                    answer.read()
                _raise_for(answer)
                for line in answer.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield from _pieces(json.loads(line[6:]))
        except httpx.HTTPError as error:
            raise _unreachable(str(self._http.base_url), error) from error

    def close(self) -> None:
        self._http.close()


def _pieces(event: dict[str, Any]) -> Iterator[Piece]:
    if "error" in event:
        raise MoeserveError(event["error"]["message"], code=ErrorCode.INTERNAL)
    for choice in event["choices"]:
        yield Piece(choice["delta"].get("content") or "", None, choice.get("finish_reason"))
    if event.get("usage"):
        yield Piece("", event["usage"]["completion_tokens"])


def _raise_for(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    raise MoeserveError(f"the server answered {answer.status_code}: {message}")


def _unreachable(url: str, error: httpx.HTTPError) -> MoeserveError:
    return MoeserveError(
        f"url: no answer from {url}: {error}",
        code=ErrorCode.UNAVAILABLE,
        field="url",
        hint="is `moeserve serve` running there?",
    )
