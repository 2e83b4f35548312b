"""Control requests of ZeroMQ clients: who may send them, and what becomes of one.

They show and change the whole server, not a request of the client's own. A socket in our own
directory, or CURVE, says that the client may; TCP on the loopback, open to every user of the
machine, does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from moeserve.control_messages import ControlReply, ControlRequest
from moeserve.core import ErrorCode, RequestError
from moeserve.gateway.engine_link import ControlCall, EngineLink


@dataclass
class ActiveControl:
    """A control request of a session, from its arrival to its answer."""

    request_id: str
    call: ControlCall | None = None
    task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        """The client waits no longer: it gets what there is."""
        if self.call is not None:
            self.call.end()


def check_allowed(endpoint: str, has_curve: bool) -> None:
    """Raises RequestError(UNAUTHORIZED) where anybody on this machine could have sent it."""
    if not has_curve and not endpoint.startswith("ipc://"):
        raise RequestError(
            f"control: {endpoint} is open to every user of this machine",
            code=ErrorCode.UNAUTHORIZED,
            hint="serve over ipc, or with --curve-dir",
        )


async def run_control(
    link: Callable[[], EngineLink], control: ActiveControl, request: ControlRequest
) -> tuple[ControlReply, list[bytes]]:
    """The engine's answer. Raises RequestError(UNAVAILABLE) where there is none."""
    control.call = link().control(request)
    try:
        return await control.call.answer()
    finally:
        control.call.end()
