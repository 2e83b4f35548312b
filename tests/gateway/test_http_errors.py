"""What a client can get wrong: each is a 4xx in the OpenAI shape; our own mistakes are a 500."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.bigram_engine import VOCAB
from support.http_requests import CHAT, HELLO, JSON, TEXT, refused
from support.http_servers import BigramServer, bigram_app, error_of

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


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"content-type": "application/json; charset=utf-16"}, "utf-16"),
        ({**JSON, "content-encoding": "gzip"}, "gzip"),
        ({**JSON, "content-encoding": "identity, br"}, "br"),
    ],
)
def test_encodings_are_refused_by_name(
    server: BigramServer, headers: dict[str, str], named: str
) -> None:
    response = server.client.post(TEXT, content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 415
    assert named in error_of(response)["message"]


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        (b"\xef\xbb\xbf" + b'{"prompt": "a"}', "byte order mark"),
        (b'{"prompt": "\\ud800"}', "in pairs"),
        (b'{"prompt": "a", "\\uDC00": 1}', "in pairs"),
        (b'{"prompt": "a", "seed": 9223372036854775808}', "to 9223372036854775807"),
    ],
)
def test_what_is_no_json_says_why(server: BigramServer, body: bytes, hint: str) -> None:
    response = server.client.post(TEXT, content=body, headers=JSON)
    assert response.status_code == 400
    assert hint in error_of(response)["message"]


def test_whole_pairs_are_not_blamed(server: BigramServer) -> None:
    body = b'{"prompt": "\\ud83d\\ude00\\uD83D\\uDE00",}'
    message = error_of(server.client.post(TEXT, content=body, headers=JSON))["message"]
    assert "trailing comma" in message
    assert "pairs" not in message


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
