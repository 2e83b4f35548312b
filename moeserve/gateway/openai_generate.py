"""What both generating routes share: parameters, running generations, collecting answers."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from moeserve import __version__
from moeserve.core import ErrorCode, FinishReason, ModelInfo, RequestError
from moeserve.gateway.errors import ApiError, invalid
from moeserve.gateway.http_stream import cancel_and_wait
from moeserve.gateway.openai_schemas import SAMPLING_FIELDS, GenerationFields
from moeserve.gateway.service import Generation, GenerationService
from moeserve.text.events import TextEvent, TokenText
from moeserve.text.request import GenerateRequest


def sampling_params(body: GenerationFields) -> dict[str, object]:
    """GenerateRequest.params from the fields of a request."""
    params: dict[str, object] = {name: getattr(body, name) for name in SAMPLING_FIELDS}
    params["include_stop"] = body.include_stop_str_in_output
    params["logit_bias"] = _logit_bias(body.logit_bias)
    return params


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    """JSON keys are strings; these must be token ids."""
    if given is None:
        return None
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid(f"logit_bias: {key[:32]!r} is not a token id", "logit_bias")
    return {int(key): bias for key, bias in given.items()}


def check_stream_options(body: GenerationFields) -> None:
    """Refuses stream options that would have no effect."""
    options = body.stream_options
    if options is None:
        return
    if not body.stream:
        raise invalid("stream_options: only allowed with stream: true", "stream_options")
    if options.include_obfuscation:
        raise ApiError(
            400,
            "stream_options.include_obfuscation: not implemented by this server; leave it out",
            param="stream_options.include_obfuscation",
            code="unsupported_parameter",
        )


def wants_usage(body: GenerationFields) -> bool:
    """True when a last chunk with the usage was asked for."""
    return bool(body.stream_options and body.stream_options.include_usage)


@asynccontextmanager
async def running(
    service: GenerationService,
    requests: Sequence[GenerateRequest],
    names: Mapping[str, str],
) -> AsyncIterator[list[Generation]]:
    """Starts the requests; on leaving, whatever has not finished is cancelled.

    names: what the client calls a field, where that differs from what the service calls it.
    """
    started: list[Generation] = []
    try:
        for request in requests:
            try:
                generation = await service.start(request)
            except RequestError as error:
                raise _in_words_of_the_client(error, names) from error
            started.append(generation)  # one at a time: a later failure cancels the earlier ones
        yield started
    finally:
        for generation in started:
            generation.cancel()


def _in_words_of_the_client(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """The same error about the field as the client named it; its message starts with the name."""
    if error.field is None or error.field not in names:
        return error
    name = names[error.field]
    return RequestError(name + str(error).removeprefix(error.field), code=error.code, field=name)


async def merged(
    generations: Sequence[Generation],
) -> AsyncGenerator[tuple[int, TextEvent], None]:
    """(number of the generation, event) as they come; nothing is read ahead of the consumer."""
    iterators = [aiter(generation) for generation in generations]
    pending = {
        asyncio.ensure_future(anext(iterator, None)): number
        for number, iterator in enumerate(iterators)
    }
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = pending.pop(task)
                event = task.result()
                if event is not None:
                    _check_end(event)
                    yield number, event
                    pending[asyncio.ensure_future(anext(iterators[number], None))] = number
    finally:
        for task in pending:
            await cancel_and_wait(task)


def _check_end(event: TextEvent) -> None:
    """A client that leaves is not told anything; who reads of an early end must learn the cause."""
    if event.finish_reason is FinishReason.CANCELLED:
        raise RequestError(
            "the server is shutting down and ended this answer", code=ErrorCode.UNAVAILABLE
        )
    if event.finish_reason is FinishReason.DEADLINE:
        raise RequestError("the answer's deadline has passed", code=ErrorCode.DEADLINE)


@dataclass
class Answer:
    """One whole answer."""

    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenText] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: str | int | None = None

    def add(self, event: TextEvent) -> None:
        self.pieces.append(event.text)
        self.logprobs.extend(event.logprobs or ())
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
            self.stop = event.stop

    @property
    def text(self) -> str:
        return "".join(self.pieces)


async def collect(generations: Sequence[Generation], num_answers: int) -> list[list[Answer]]:
    """All answers of all generations, when the last is complete."""
    answers = [[Answer() for _ in range(num_answers)] for _ in generations]
    async for number, event in merged(generations):
        answers[number][event.index].add(event)
    return answers


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """The `usage` object, summed over the prompts of a request."""
    each = [generation.usage for generation in generations]
    prompt = sum(u.prompt_tokens for u in each)
    completion = sum(u.completion_tokens for u in each)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in each)},
    }


def finish_reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value


class Envelope:
    """The fields that every object of one response repeats."""

    def __init__(self, prefix: str, info: ModelInfo) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = info.name
        self._fingerprint = system_fingerprint(info)

    def around(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "system_fingerprint": self._fingerprint,
        }


def system_fingerprint(info: ModelInfo) -> str:
    """Equal for servers that should give the same tokens for the same seeded request."""
    parts = (__version__, info.model_type, info.path, info.dtype, info.device)
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
