"""How the gateway reaches an engine: the interface that fronts and the service are written to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from moeserve.control_messages import ControlReply, ControlRequest
from moeserve.core import EngineDelta, EngineRequest, FinishReason
from moeserve.messages import EngineStatus


class EngineStream(Protocol):
    """The deltas of one request, in order; ends after the delta that has a finish_reason.

    A reader that falls behind gets merged deltas: never more than one delta waits, so memory stays
    bounded by the length of the answer. An engine that dies ends the stream with a delta whose
    finish_reason is ERROR and whose error_code is UNAVAILABLE.
    """

    def __aiter__(self) -> AsyncIterator[EngineDelta]: ...


class ControlCall(Protocol):
    """A control request that the engine has been sent."""

    async def answer(self) -> tuple[ControlReply, list[bytes]]:
        """The reply and its raw frames. Raises RequestError(UNAVAILABLE) when the engine goes."""
        ...

    def end(self) -> None:
        """Asks for the answer now; does nothing once it is there."""
        ...


class EngineLink(Protocol):
    @property
    def status(self) -> EngineStatus:
        """The engine's last word about itself: stage, model info, stats."""
        ...

    def submit(self, request: EngineRequest) -> EngineStream:
        """Sends a request. Raises RequestError(UNAVAILABLE) when no engine is ready."""
        ...

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Ends a request early; its stream still ends with a delta. Unknown ids are ignored."""
        ...

    def control(self, request: ControlRequest) -> ControlCall:
        """Sends a control request. Raises RequestError(UNAVAILABLE) when no engine is ready."""
        ...
