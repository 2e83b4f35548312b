"""Limits that hold before any handler runs: the size of the head, of the body, and their time.

Plain ASGI middleware: it wraps `receive`, so chunked bodies of unknown length are cut off while
they arrive and a handler's watch for a client that left still reaches the server underneath.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeserve.core import ErrorCode
from moeserve.gateway.errors import ApiError, invalid


class RequestSizeLimits:
    """ASGI middleware: 431 for a large head, 413 for a large body, 408 for a body that stalls."""

    def __init__(
        self, app: ASGIApp, max_header_bytes: int, max_body_bytes: int, body_timeout_s: float
    ) -> None:
        self.app = app
        self.max_header_bytes = max_header_bytes
        self.max_body_bytes = max_body_bytes
        self.body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_head(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _check_head(self, scope: Scope) -> None:
        # name: value CR LF
        head_bytes = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        head_bytes += len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if head_bytes > self.max_header_bytes:
            raise ApiError(
                431,
                f"headers: {head_bytes} bytes, at most {self.max_header_bytes} are allowed",
                code=ErrorCode.TOO_LARGE.value,
            )
        names = {name for name, _ in scope["headers"]}
        if names >= {b"content-length", b"transfer-encoding"}:
            # Two lengths: a proxy that believes the other one sees other requests than we do
            # (RFC 9112, section 6.1).
            raise invalid("content-length: not allowed beside transfer-encoding; send one")
        for name, value in scope["headers"]:
            if name == b"content-length":
                if not value.isdigit() or len(value) > 20:  # 20 digits hold any 64-bit size
                    shown = value[:40].decode("latin-1")
                    raise invalid(f"content-length: {shown!r} is not a number of bytes")
                if int(value) > self.max_body_bytes:
                    raise self._body_too_large(f"{int(value)} bytes")

    def _body_too_large(self, size: str) -> ApiError:
        return ApiError(
            413,
            f"body: {size}, at most {self.max_body_bytes} bytes are allowed",
            code=ErrorCode.TOO_LARGE.value,
        )

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that raises ApiError once the body is larger or slower than allowed."""
        received_bytes = 0
        complete = False

        async def limited_receive() -> Message:
            nonlocal received_bytes, complete
            if complete:  # what comes now is the client's disconnect, which may take any time
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.body_timeout_s)
            except asyncio.TimeoutError as error:
                text = f"body: nothing came for {self.body_timeout_s:g} s"
                raise ApiError(408, text, code="request_timeout") from error
            if message["type"] == "http.request":
                received_bytes += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            if received_bytes > self.max_body_bytes:
                raise self._body_too_large(f"more than {self.max_body_bytes} bytes")
            return message

        return limited_receive
