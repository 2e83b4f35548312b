"""What a client can get wrong: each is a 4xx in the OpenAI shape that names the field."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bigram_engine import VOCAB
from support.http_servers import BigramServer, bigram_app, error_of

from moeserve.gateway.openai_schemas import (
    CHAT_UNIMPLEMENTED,
    COMPLETION_UNIMPLEMENTED,
    ChatRequest,
    CompletionRequest,
)

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BigramServer]:
    with BigramServer(tmp_path_factory.mktemp("model")) as server:
        yield server


@pytest.fixture(autouse=True)
def _goes_on_and_leaks_nothing(server: BigramServer) -> Iterator[None]:
    yield
    answer = server.client.post(TEXT, json={"prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    server.wait_until(lambda: not server.inside.engine.num_running)
    server.wait_until(lambda: not server.inside.service.num_running)


def refused(
    server: BigramServer, path: str, body: Any, status: int = 400, param: str | None = None
) -> str:
    """The message of the error that the body must lead to."""
    response = server.client.post(path, json=body)
    assert response.status_code == status, response.text
    error = error_of(response)
    assert error["param"] == param, error
    return str(error["message"])


# -- not JSON at all ----------------------------------------------------------------------------

NOT_JSON = {
    "nothing": b"",
    "broken": b'{"prompt": "a"',
    "trailing": b'{"prompt": "a"} x',
    "no object": b'["a"]',
    "utf-8": b'{"prompt": "\xff\xfe"}',
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "surrogate": b'{"prompt": "\\ud800"}',
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "overflow": b'{"prompt": "a", "temperature": 1e999}',
    "huge int": b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
    "large int": b'{"prompt": "a", "seed": 1' + b"0" * 300 + b"}",
    "17 levels": b'{"prompt": "a", "user": ' + b"[" * 17 + b"]" * 17 + b"}",
    "deep": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "open deep": b"[" * 200_000,
}
#: these name the field
NOT_JSON_FIELDS = {"large int": "seed", "17 levels": "user"}


@pytest.mark.parametrize("path", [TEXT, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("name", NOT_JSON)
def test_not_json(server: BigramServer, path: str, name: str) -> None:
    response = server.client.post(path, content=NOT_JSON[name], headers=JSON)
    assert response.status_code == 400, response.text
    assert NOT_JSON_FIELDS.get(name, "body") in error_of(response)["message"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "a/b/c"])
def test_content_type_must_be_json(server: BigramServer, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = server.client.post(TEXT, content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


def test_content_type_may_have_parameters(server: BigramServer) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    response = server.client.post(TEXT, content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 200


# -- fields -------------------------------------------------------------------------------------

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
        ({}, None),
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
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_bad_completions(server: BigramServer, body: Any, param: str | None) -> None:
    refused(server, TEXT, body, param=param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
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
def test_bad_chats(server: BigramServer, body: Any, param: str | None) -> None:
    refused(server, CHAT, body, param=param)


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_for_the_context(server: BigramServer, stream: bool) -> None:
    context = server.inside.engine.info.context_tokens
    body = {"prompt": "x" * context, "max_tokens": 1, "stream": stream}
    response = server.client.post(TEXT, json=body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "context_length_exceeded"
    assert str(context) in error["message"]
    long = [{"role": "user", "content": "x" * (context + 1)}]
    response = server.client.post(CHAT, json={"messages": long, "stream": stream})
    assert error_of(response)["code"] == "context_length_exceeded"


def test_unknown_model(server: BigramServer) -> None:
    for path, fields in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": HELLO})):
        response = server.client.post(path, json={**fields, "model": "gpt-9"})
        assert response.status_code == 404
        error = error_of(response)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "bigram" in error["message"]
    response = server.client.get("/v1/models/no/such/model")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


def test_unknown_paths_and_methods(server: BigramServer) -> None:
    for path in ("/", "/v2/models", "/v1/embeddings", "/v1/models/", "/v1/completions/", "/docs"):
        response = server.client.post(path, json={})
        assert response.status_code in (404, 405), path
        error_of(response)
    response = server.client.get(TEXT)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    error_of(response)
    assert server.client.options(TEXT).status_code == 405  # no CORS unless somebody asks for it


def test_no_cors(server: BigramServer) -> None:
    response = server.client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("tokens", [[VOCAB], [-1], ["a"], 5, [1.5]])
def test_bad_detokenize(server: BigramServer, tokens: Any) -> None:
    response = server.client.post("/detokenize", json={"tokens": tokens})
    assert response.status_code == 400
    assert "tokens" in error_of(response)["message"]


def test_bad_tokenize(server: BigramServer) -> None:
    refused(server, "/tokenize", {}, param="prompt")
    refused(server, "/tokenize", {"prompt": "a", "messages": HELLO}, param="messages")
    refused(server, "/tokenize", {"prompt": 5}, param="prompt")


def test_text_longer_than_the_context_can_be_counted(server: BigramServer) -> None:
    response = server.client.post("/tokenize", json={"prompt": "x" * 5000})
    assert response.json()["count"] == 5000


# -- any JSON -----------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.sampled_from(["user", "assistant", "text", "auto", "none", "a" * 5000, "\ud800", "\0"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "1"]), inner)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
field_names = sorted(
    {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *CHAT_UNIMPLEMENTED}
)
likely = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.just("abc") | st.lists(st.integers(0, VOCAB - 1), max_size=5) | values,
        "messages": st.just(HELLO) | values,
        "max_tokens": st.integers(-1, 6) | values,
        "stream": st.booleans() | values,
        "n": st.integers(0, 3) | values,
        "logprobs": st.integers(-1, 4) | st.booleans() | values,
        "echo": st.booleans() | values,
        "stop": st.text(max_size=2) | values,
    },
)
bodies = st.builds(
    lambda known, extra: {**known, **extra},
    likely,
    st.dictionaries(st.sampled_from(field_names) | st.text(max_size=8), values, max_size=2),
)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    path=st.sampled_from([TEXT, CHAT, "/tokenize", "/detokenize"]),
    body=bodies | bodies | values | st.fixed_dictionaries({"tokens": values}),
)
def test_no_body_is_the_servers_fault(server: BigramServer, path: str, body: Any) -> None:
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    response = server.client.post(path, content=content, headers=JSON)
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        error_of(response)
    else:
        assert "event: error" not in response.text


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=64) | values.map(lambda v: json.dumps(v).encode()[:-1]))
def test_no_bytes_are_the_servers_fault(server: BigramServer, body: bytes) -> None:
    response = server.client.post(TEXT, content=body, headers=JSON)
    assert 400 <= response.status_code < 500
    error_of(response)


def test_our_own_mistakes_are_500_and_tell_nothing(tmp_path: Path) -> None:
    async def run() -> httpx.Response:
        async with bigram_app(tmp_path) as inside:

            @inside.app.get("/broken")
            async def broken() -> None:
                raise KeyError("a secret")

            transport = httpx.ASGITransport(inside.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://[::1]") as client:
                answer = await client.get("/broken")
                assert b'{method="GET",route="/broken",status="500"} 1.0' in inside.metrics.text()
                return answer

    response = asyncio.run(run())
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
