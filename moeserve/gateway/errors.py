"""Errors as HTTP clients see them: the OpenAI shape, for everything that is not a 2xx.

`{"error": {"message", "type", "param", "code"}}`, with the status codes the OpenAI API documents
(https://platform.openai.com/docs/guides/error-codes), so that SDKs raise their own exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

import msgspec
from starlette.responses import Response

from moeserve.core import ErrorCode, ModelInfo, MoeserveError, RequestError

#: nginx's status for a client that closed the connection; nobody is left to read it
CLIENT_CLOSED_REQUEST = 499

STATUS_OF_CODE: Mapping[ErrorCode, int] = MappingProxyType(
    {
        ErrorCode.INVALID: 400,
        ErrorCode.CONTEXT_LENGTH: 400,
        ErrorCode.UNKNOWN_MODEL: 404,
        ErrorCode.UNAUTHORIZED: 401,
        ErrorCode.TOO_LARGE: 413,
        ErrorCode.OVERLOADED: 429,
        ErrorCode.UNAVAILABLE: 503,
        ErrorCode.DEADLINE: 504,
        ErrorCode.CANCELLED: CLIENT_CLOSED_REQUEST,
        ErrorCode.PROTOCOL: 400,
        ErrorCode.INTERNAL: 500,
    }
)

#: seconds after which a client may try again
RETRY_AFTER_S: Mapping[int, int] = MappingProxyType({429: 1, 503: 5})


def _type_of_status(status: int) -> str:
    named = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    if status in named:
        return named[status]
    return "server_error" if status >= 500 else "invalid_request_error"


class ApiError(Exception):
    """An answer that is an error: an HTTP status and the OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if status in RETRY_AFTER_S:
            self.headers.setdefault("retry-after", str(RETRY_AFTER_S[status]))

    @classmethod
    def of(cls, error: MoeserveError) -> ApiError:
        """The same error as HTTP says it."""
        status = STATUS_OF_CODE[error.code]
        return cls(status, str(error), param=error.field, code=error.code.value)

    @property
    def body(self) -> dict[str, Any]:
        error = {
            "message": str(self),
            "type": _type_of_status(self.status),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        return json_response(self.body, status=self.status, headers=self.headers)


def invalid(message: str, param: str | None = None) -> ApiError:
    """A 400 about one field of the request."""
    return ApiError(400, message, param=param, code=ErrorCode.INVALID.value)


def check_model(name: str | None, info: ModelInfo) -> None:
    """Raises RequestError(UNKNOWN_MODEL) unless it is the model served, or none is named."""
    if name is not None and name != info.name:
        raise RequestError(
            f"model: {name[:200]!r} is not served here; this server has {info.name!r}",
            code=ErrorCode.UNKNOWN_MODEL,
            field="model",
        )


def of_status(status: int, detail: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """An error that the framework found: unknown path, wrong method."""
    phrase = HTTPStatus(status).phrase.lower().replace(" ", "_")
    return ApiError(status, detail, code=phrase, headers=headers)


def json_response(
    body: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON response."""
    content = msgspec.json.encode(body)
    return Response(content, status, headers=headers, media_type="application/json")
