"""Any JSON, and any bytes: never the server's fault."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bigram_engine import VOCAB
from support.http_requests import CHAT, HELLO, JSON, TEXT
from support.http_servers import BigramServer, error_of

from moeserve.gateway.openai_schemas import CHAT_UNIMPLEMENTED, ChatRequest, CompletionRequest

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


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=64) | values.map(lambda v: json.dumps(v).encode()[:-1]))
def test_no_bytes_are_the_servers_fault(server: BigramServer, body: bytes) -> None:
    response = server.client.post(TEXT, content=body, headers=JSON)
    assert 400 <= response.status_code < 500
    error_of(response)
