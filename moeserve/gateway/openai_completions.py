"""POST /v1/completions: legacy text completion, which evaluation harnesses score prompts with.

`echo: true` with `logprobs` returns the prompt's log-probabilities before the answer's, as the
legacy API does; with `max_tokens: 0` the prompt is scored and nothing is generated.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from moeserve.gateway.errors import ApiError, invalid, json_response
from moeserve.gateway.http_json import read_json
from moeserve.gateway.http_stream import EventStreamResponse, sse, unless_disconnected
from moeserve.gateway.lifecycle import Lifecycle
from moeserve.gateway.openai_generate import (
    Answer,
    Envelope,
    check_stream_options,
    collect,
    finish_reason,
    merged,
    running,
    sampling_params,
    usage,
    wants_usage,
)
from moeserve.gateway.openai_logprobs import legacy_logprobs, prompt_logprobs
from moeserve.gateway.openai_schemas import (
    COMPLETION_MAX_TOKENS,
    COMPLETION_UNIMPLEMENTED,
    CompletionRequest,
)
from moeserve.gateway.service import Generation, GenerationService
from moeserve.text.events import TextEvent, TokenText
from moeserve.text.request import GenerateRequest

KIND: Final = "text_completion"

#: the service's name of a field -> the client's
FIELD_NAMES: Final = MappingProxyType({"token_ids": "prompt"})

Prompt = str | list[int]


async def create_completion(request: Request, lifecycle: Lifecycle, max_prompts: int) -> Response:
    """The route's handler."""
    body = await read_json(request, CompletionRequest, COMPLETION_UNIMPLEMENTED)
    completion = _Completion(body, lifecycle.service(), max_prompts)
    headers = {"x-request-id": completion.envelope.id}
    if body.stream:
        return EventStreamResponse(completion.stream(), headers)
    answer = await unless_disconnected(request.receive, completion.whole())
    return json_response(answer, headers=headers)


def split_prompts(given: str | list[Any], max_prompts: int) -> list[Prompt]:
    """The prompts of a request: a text, token ids, or a list of either kind.

    Raises ApiError for an empty list, a list of mixed kinds, or too many prompts.
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("prompt: the list is empty; send a text or at least one token id", "prompt")
    kinds = {type(item) for item in given}
    if kinds == {int}:
        return [given]
    if kinds not in ({str}, {list}):
        raise invalid("prompt: mixes texts and token ids; send one kind", "prompt")
    if len(given) > max_prompts:
        raise invalid(f"prompt: {len(given)} prompts, at most {max_prompts} in a request", "prompt")
    return list(given)


@dataclass(frozen=True)
class _Echo:
    """What comes before an answer when the prompt is echoed.

    offset: characters of the prompt before the answer's own first one, in every chunk.
    """

    text: str
    logprobs: tuple[TokenText, ...]
    offset: int

    def sent(self) -> _Echo:
        """The same once its text is out: it counts for offsets and is not sent again."""
        return _Echo("", (), self.offset)


class _Completion:
    """One request: checks what spans fields, then runs one generation per prompt."""

    def __init__(
        self, body: CompletionRequest, service: GenerationService, max_prompts: int
    ) -> None:
        self.body = body
        self.service = service
        self.envelope = Envelope("cmpl", service.info)
        self.num_answers = 1 if body.n is None else body.n
        self._check()
        self.prompts = split_prompts(body.prompt, max_prompts)
        self.requests = [
            self._generate_request(number, prompt) for number, prompt in enumerate(self.prompts)
        ]

    def _check(self) -> None:
        body = self.body
        check_stream_options(body)
        if body.best_of not in (None, self.num_answers):
            raise ApiError(
                400,
                f"best_of: {body.best_of} is not implemented by this server; leave it out or send"
                f" n's value ({self.num_answers})",
                param="best_of",
                code="unsupported_parameter",
            )
        if body.prompt_logprobs is not None and body.stream:
            text = "prompt_logprobs: not available with stream: true; use echo and logprobs"
            raise invalid(text, "prompt_logprobs")

    def _generate_request(self, number: int, prompt: Prompt) -> GenerateRequest:
        body = self.body
        params = sampling_params(body)
        if body.max_tokens is None:
            params["max_tokens"] = max(COMPLETION_MAX_TOKENS, body.min_tokens or 0)
        params["logprobs"] = body.logprobs
        if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
            params["prompt_logprobs"] = body.logprobs
        return GenerateRequest(
            request_id=f"{self.envelope.id}-{number}",
            model=body.model,
            prompt=prompt if isinstance(prompt, str) else None,
            token_ids=prompt if isinstance(prompt, list) else None,
            params=params,
            add_special_tokens=body.add_special_tokens is not False,
            priority=body.priority or 0,
        )

    async def whole(self) -> dict[str, Any]:
        """The response body of a request that does not stream."""
        async with running(self.service, self.requests, FIELD_NAMES) as generations:
            answers = await collect(generations, self.num_answers)
            choices = [
                self._choice(number, index, generations[number], answer)
                for number, group in enumerate(answers)
                for index, answer in enumerate(group)
            ]
            return {**self.envelope.around(KIND, choices), "usage": usage(generations)}

    def _echo(self, generation: Generation) -> _Echo:
        if not self.body.echo:
            return _Echo("", (), 0)
        logprobs = generation.prompt_logprobs if self.body.logprobs is not None else None
        text = generation.prompt_text
        return _Echo(text, logprobs or (), len(text))

    def _choice(
        self, number: int, index: int, generation: Generation, answer: Answer
    ) -> dict[str, Any]:
        echo = self._echo(generation)
        choice = self._choice_part(number, index, echo, answer.text, answer.logprobs)
        choice["finish_reason"] = finish_reason(answer.finish_reason)
        choice["stop_reason"] = answer.stop
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(generation.prompt_logprobs or ())
        return choice

    def _choice_part(
        self, number: int, index: int, echo: _Echo, text: str, tokens: Sequence[TokenText]
    ) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            before = legacy_logprobs(echo.logprobs)
            after = legacy_logprobs(tokens, shift=echo.offset)
            logprobs = {name: before[name] + after[name] for name in after}
        return {
            "index": number * self.num_answers + index,
            "text": echo.text + text,
            "logprobs": logprobs,
            "finish_reason": None,
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The encoded events of a request that streams."""
        async with running(self.service, self.requests, FIELD_NAMES) as generations:
            echoes: dict[tuple[int, int], _Echo] = {}
            async for number, event in merged(generations):
                answer = (number, event.index)
                echo = echoes.get(answer) or self._echo(generations[number])
                echoes[answer] = echo.sent()
                if (chunk := self._chunk(number, event, echo)) is not None:
                    yield sse(chunk)
            if wants_usage(self.body):
                yield sse({**self.envelope.around(KIND, []), "usage": usage(generations)})

    def _chunk(self, number: int, event: TextEvent, echo: _Echo) -> dict[str, Any] | None:
        tokens = event.logprobs or ()
        if not (event.text or tokens or echo.text or event.finish_reason):
            return None
        choice = self._choice_part(number, event.index, echo, event.text, tokens)
        choice["finish_reason"] = finish_reason(event.finish_reason)
        if event.finish_reason is not None:
            choice["stop_reason"] = event.stop
        chunk = self.envelope.around(KIND, [choice])
        return {**chunk, "usage": None} if wants_usage(self.body) else chunk
