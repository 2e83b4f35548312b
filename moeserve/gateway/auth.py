"""The API key: a bearer token that every route but /health asks for."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from moeserve.core import ErrorCode
from moeserve.gateway.errors import ApiError

#: load balancers probe it and have no key
OPEN_PATHS = frozenset({"/health"})


class ApiKeyAuth:
    """ASGI middleware that answers 401 unless `Authorization: Bearer <key>` is there.

    The comparison takes the same time wherever the keys differ, so that response times do not
    tell how much of a guess was right (only the length of the key can show).
    """

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS or self._is_authorized(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "missing or wrong API key; send it as the header `Authorization: Bearer <key>`",
            code=ErrorCode.UNAUTHORIZED.value,
            headers={"www-authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _is_authorized(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token, self._expected)
