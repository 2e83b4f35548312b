"""Fields of a request with wrong values: each is a 400 that names the field."""

from __future__ import annotations

from typing import Any

import pytest
from support.bigram_engine import VOCAB
from support.http_requests import CHAT, HELLO, TEXT, refused
from support.http_servers import BigramServer, error_of

from moeserve.gateway.openai_schemas import (
    CHAT_UNIMPLEMENTED,
    COMPLETION_UNIMPLEMENTED,
    ChatRequest,
    CompletionRequest,
)

#: a field's wrong values, on both generating routes
BAD_VALUES: dict[str, list[Any]] = {
    "temperature": [-0.1, 101, "hot", True, [1]],
    "top_p": [0, -1, 1.01, "x"],
    "top_k": [-1, 1.5, "x"],
    "min_p": [-0.1, 1.1],
    "n": [0, -1, 17, 10**6, 2**63, 1.5, "two"],
    "max_tokens": [-1, 1.5, "many", True],
    "seed": ["x", 1.5, 2**63],
    "stop": [1, [""], ["a"] * 17, ["x" * 1000], [1], {}],
    "stop_token_ids": [[-1], [VOCAB], ["a"], 1, list(range(100))],
    "presence_penalty": [-2.1, 2.1, "x"],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, 11],
    "min_tokens": [-1, 10**6],
    "logit_bias": [{"a": 1}, {"1": 101}, {"1": "x"}, {"-1": 1}, {str(VOCAB): 1}, [1], {"²": 1}],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}],  # without stream
    "priority": ["high", 1.5],
    "ignore_eos": ["no", 1],
    "prompt_logprobs": [-1, 21, True],
}


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in BAD_VALUES.items() for v in vs])
def test_values_out_of_range(server: BigramServer, path: str, field: str, value: Any) -> None:
    given = {"prompt": "a"} if path == TEXT else {"messages": HELLO}
    response = server.client.post(path, json={**given, "max_tokens": 8, field: value})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["param"] or "").startswith(field), error
    assert field in error["message"]


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_unknown_fields_have_a_hint(server: BigramServer, path: str) -> None:
    given = {"prompt": "a"} if path == TEXT else {"messages": HELLO}
    message = refused(server, path, {**given, "temprature": 1}, param="temprature")
    assert "did you mean 'temperature'" in message
    assert "known:" in refused(server, path, {**given, "qqq": 1}, param="qqq")
    body = {**given, "stream": True, "stream_options": {"include_usages": True}}
    refused(server, path, body, param="stream_options")


NOT_NEUTRAL: dict[str, Any] = {"tools": [{"type": "function"}], "best_of": 3, "echo": True}
UNIMPLEMENTED = [(TEXT, name) for name in COMPLETION_UNIMPLEMENTED]
UNIMPLEMENTED += [(CHAT, name) for name in CHAT_UNIMPLEMENTED]


def test_best_of_other_than_n_is_not_implemented(server: BigramServer) -> None:
    body = {"prompt": "a", "best_of": 2}
    assert "not implemented" in refused(server, TEXT, body, param="best_of")


@pytest.mark.parametrize(("path", "field"), UNIMPLEMENTED)
def test_unimplemented_fields_are_refused_by_name(
    server: BigramServer, path: str, field: str
) -> None:
    given: dict[str, Any] = {"prompt": "a"} if path == TEXT else {"messages": HELLO}
    body = {**given, field: NOT_NEUTRAL.get(field, {"type": "something"})}
    assert "not implemented" in refused(server, path, body, param=field)
    known = CompletionRequest if path == TEXT else ChatRequest
    assert field not in known.__struct_fields__


def test_json_schema_is_not_taken_for_text(server: BigramServer) -> None:
    for kind in ("json_object", "json_schema"):
        body = {"messages": HELLO, "response_format": {"type": kind}}
        refused(server, CHAT, body, param="response_format")


def test_unimplemented_parts_of_a_message(server: BigramServer) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
    refused(server, CHAT, {"messages": [*HELLO, call]}, param="messages[1].tool_calls")
    image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    body = {"messages": [{"role": "user", "content": image}]}
    assert "text" in refused(server, CHAT, body, param="messages[0].content")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [VOCAB]}, "prompt"),
        ({"prompt": [2**62]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_bad_completions(server: BigramServer, body: Any, param: str) -> None:
    refused(server, TEXT, body, param=param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": 1, "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
        ({"messages": HELLO, "logprobs": 3}, "logprobs"),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"messages": HELLO, "max_completion_tokens": -1}, "max_completion_tokens"),
        ({"messages": HELLO, "metadata": {"a": 1}}, "metadata"),
    ],
)
def test_bad_chats(server: BigramServer, body: Any, param: str) -> None:
    refused(server, CHAT, body, param=param)
