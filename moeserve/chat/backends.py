"""Where answers come from: a model in this process, a server over HTTP, a server over ZeroMQ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from moeserve.client import Client
from moeserve.core import ErrorCode, MoeserveError
from moeserve.llm import LLM

Message = Mapping[str, str]  # role, content


@dataclass(frozen=True)
class Piece:
    """More of an answer. num_tokens: generated so far, where the source says it."""

    text: str
    num_tokens: int | None = None
    finish_reason: str | None = None


class Backend(Protocol):
    """One place to ask. Closing a stream early (or interrupting it) cancels the answer."""

    name: str

    def stream(self, messages: Sequence[Message], params: Mapping[str, Any]) -> Iterator[Piece]:
        """Pieces of the answer to the last message. Raises MoeserveError."""
        ...

    def close(self) -> None: ...


class LocalBackend:
    """The engine in this process."""

    def __init__(self, llm: LLM, name: str) -> None:
        self.name = name
        self._llm = llm

    def stream(self, messages: Sequence[Message], params: Mapping[str, Any]) -> Iterator[Piece]:
        num_tokens = 0
        with closing(self._llm.stream([dict(m) for m in messages], **params)) as events:
            for event in events:
                num_tokens += len(event.token_ids)
                reason = event.finish_reason.value if event.finish_reason else None
                yield Piece(event.text, num_tokens, reason)

    def close(self) -> None:
        self._llm.close()


class HttpBackend:
    """Any server with the OpenAI chat API."""

    def __init__(self, url: str, api_key: str | None) -> None:
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

    def stream(self, messages: Sequence[Message], params: Mapping[str, Any]) -> Iterator[Piece]:
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
