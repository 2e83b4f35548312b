"""Requests of the OpenAI API that tests make, and refusals of them."""

from __future__ import annotations

from typing import Any

from support.http_servers import BigramServer, error_of

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
JSON = {"content-type": "application/json"}


def refused(
    server: BigramServer, path: str, body: Any, status: int = 400, param: str | None = None
) -> str:
    """The message of the error that the body must lead to."""
    response = server.client.post(path, json=body)
    assert response.status_code == status, response.text
    error = error_of(response)
    assert error["param"] == param, error
    return str(error["message"])
