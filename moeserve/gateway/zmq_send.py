"""One non-blocking send on a ROUTER socket, and what became of it."""

from __future__ import annotations

import asyncio
import errno
from enum import Enum
from typing import Any, cast

import zmq
import zmq.asyncio


class Sent(Enum):
    """YES: queued. FULL: the peer's queue is at its high-water mark. GONE: no such peer."""

    YES = "yes"
    FULL = "full"
    GONE = "gone"


def try_send(router: zmq.asyncio.Socket, peer: bytes, frames: list[bytes]) -> Sent:
    """Sends to one peer without waiting. The socket must have router_mandatory set."""
    attempt = router.send_multipart([peer, *frames], zmq.NOBLOCK)
    # pyzmq resolves the future of a NOBLOCK send before it returns it (zmq/_future.py).
    error = cast("asyncio.Future[Any]", attempt).exception()
    if error is None:
        return Sent.YES
    if isinstance(error, zmq.Again):
        return Sent.FULL
    if isinstance(error, zmq.ZMQError) and error.errno == errno.EHOSTUNREACH:
        return Sent.GONE
    raise error
