"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moeserve.gateway.errors import invalid, json_response
from moeserve.gateway.http_json import read_json, without_unimplemented
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
from moeserve.gateway.openai_logprobs import chat_logprobs, prompt_logprobs
from moeserve.gateway.openai_schemas import (
    CHAT_UNIMPLEMENTED,
    MESSAGE_UNIMPLEMENTED,
    ChatRequest,
)
from moeserve.gateway.service import Generation, GenerationService
from moeserve.text.events import TextEvent
from moeserve.text.request import GenerateRequest


async def create_chat_completion(request: Request, lifecycle: Lifecycle) -> Response:
    """The route's handler."""
    body = await read_json(request, ChatRequest, CHAT_UNIMPLEMENTED)
    chat = _Chat(body, lifecycle.service())
    headers = {"x-request-id": chat.envelope.id}
    if body.stream:
        return EventStreamResponse(chat.stream(), headers)
    answer = await unless_disconnected(request.receive, chat.whole())
    return json_response(answer, headers=headers)


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the chat template wants them; what else they may hold is checked behind this.

    `developer` is what newer models of the OpenAI API call `system`. Raises ApiError for a field
    that is used and not implemented (tool calls, audio, names).
    """
    kept = []
    for number, message in enumerate(messages):
        fields = without_unimplemented(message, MESSAGE_UNIMPLEMENTED, f"messages[{number}].")
        if fields.get("role") == "developer":
            fields["role"] = "system"
        kept.append(fields)
    return kept


class _Chat:
    """One request: checks what spans fields, then runs one generation."""

    def __init__(self, body: ChatRequest, service: GenerationService) -> None:
        self.body = body
        self.service = service
        self.envelope = Envelope("chatcmpl", service.info)
        self.num_answers = 1 if body.n is None else body.n
        #: the service's name of a field -> the client's
        self.field_names = {"logprobs": "top_logprobs"}
        if body.max_completion_tokens is not None:
            self.field_names["max_tokens"] = "max_completion_tokens"
        self._check()
        self.request = self._generate_request()

    def _check(self) -> None:
        body = self.body
        check_stream_options(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs: needs logprobs: true", "top_logprobs")
        if body.prompt_logprobs is not None and body.stream:
            raise invalid("prompt_logprobs: not available with stream: true", "prompt_logprobs")
        both = (body.max_tokens, body.max_completion_tokens)
        if None not in both and body.max_tokens != body.max_completion_tokens:
            text = f"max_tokens: {both[0]} contradicts max_completion_tokens: {both[1]}; send one"
            raise invalid(text, "max_tokens")

    def _generate_request(self) -> GenerateRequest:
        body = self.body
        params = sampling_params(body)
        if body.max_completion_tokens is not None:
            params["max_tokens"] = body.max_completion_tokens
        params["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
        return GenerateRequest(
            request_id=self.envelope.id,
            model=body.model,
            messages=template_messages(body.messages),
            params=params,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            template_variables=body.chat_template_kwargs or {},
            priority=body.priority or 0,
        )

    async def whole(self) -> dict[str, Any]:
        """The response body of a request that does not stream."""
        async with running(self.service, [self.request], self.field_names) as generations:
            [answers] = await collect(generations, self.num_answers)
            choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
            response = self.envelope.around("chat.completion", choices)
            response["usage"] = usage(generations)
            self._add_prompt_logprobs(response, generations[0])
            return response

    def _add_prompt_logprobs(self, response: dict[str, Any], generation: Generation) -> None:
        if self.body.prompt_logprobs is not None:
            response["prompt_logprobs"] = prompt_logprobs(generation.prompt_logprobs or ())

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": chat_logprobs(answer.logprobs) if self.body.logprobs else None,
            "finish_reason": finish_reason(answer.finish_reason),
            "stop_reason": answer.stop,
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The encoded events of a request that streams: role, text, finish reason, usage."""
        async with running(self.service, [self.request], self.field_names) as generations:
            opened: set[int] = set()
            async for _, event in merged(generations):
                if event.index not in opened:
                    opened.add(event.index)
                    yield self._delta(event.index, {"role": "assistant", "content": ""})
                for part in self._deltas(event):
                    yield part
            if wants_usage(self.body):
                last = self.envelope.around("chat.completion.chunk", [])
                yield sse({**last, "usage": usage(generations)})

    def _deltas(self, event: TextEvent) -> list[bytes]:
        parts = []
        if event.text or event.logprobs:
            logprobs = chat_logprobs(event.logprobs or ()) if self.body.logprobs else None
            parts.append(self._delta(event.index, {"content": event.text}, logprobs=logprobs))
        if event.finish_reason is not None:
            reason = finish_reason(event.finish_reason)
            parts.append(self._delta(event.index, {}, finish_reason=reason, stop_reason=event.stop))
        return parts

    def _delta(self, index: int, delta: dict[str, Any], **fields: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
        chunk = self.envelope.around("chat.completion.chunk", [choice])
        return sse({**chunk, "usage": None} if wants_usage(self.body) else chunk)
