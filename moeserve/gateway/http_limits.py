"""Limits that hold before any handler runs: the size of the head, of the body, and its time.

Plain ASGI middleware: it wraps `receive`, so chunked bodies of unknown length are cut off while
they arrive and a handler's watch for a client that left still reaches the server underneath.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeserve.core import ErrorCode
from moeserve.gateway.errors import ApiError, invalid


class RequestSizeLimits:
    """ASGI middleware: 431 for a large head, 413 for a large body, 408 for a slow one.

    A body is slow when nothing comes for `body_timeout_s`, or when it is not there after
    `receive_timeout_s`, however steadily it comes. What is slow before and after that is a matter
    of the connection (`http_connection`).
    """

    def __init__(
        self,
        app: ASGIApp,
        max_header_bytes: int,
        max_body_bytes: int,
        body_timeout_s: float,
        receive_timeout_s: float,
    ) -> None:
        self.app = app
        self.max_header_bytes = max_header_bytes
        self.max_body_bytes = max_body_bytes
        self.body_timeout_s = body_timeout_s
        self.receive_timeout_s = receive_timeout_s

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

    def _body_too_slow(self, stalled: bool) -> ApiError:
        text = (
            f"body: nothing came for {self.body_timeout_s:g} s"
            if stalled
            else f"body: it was not complete after {self.receive_timeout_s:g} s"
        )
        # Closed, because the rest of this body would have to be read before another request.
        headers = {"connection": "close"}
        return ApiError(408, text, code="request_timeout", headers=headers)

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that raises ApiError once the body is larger or slower than allowed."""
        received_bytes = 0
        complete = False
        clock_s = asyncio.get_running_loop().time
        end_s = clock_s() + self.receive_timeout_s

        async def limited_receive() -> Message:
            nonlocal received_bytes, complete
            if complete:  # what comes now is the client's disconnect, which may take any time
                return await receive()
            left_s = end_s - clock_s()
            try:
                message = await asyncio.wait_for(receive(), min(self.body_timeout_s, left_s))
            except asyncio.TimeoutError as error:
                raise self._body_too_slow(stalled=left_s > self.body_timeout_s) from error
            if message["type"] == "http.request":
                received_bytes += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            if received_bytes > self.max_body_bytes:
                raise self._body_too_large(f"more than {self.max_body_bytes} bytes")
            return message

        return limited_receive
