"""What the gateway can do right now: loading, ready, failed, draining."""

from __future__ import annotations

from moeserve.core import ErrorCode, RequestError
from moeserve.gateway.engine_link import EngineLink
from moeserve.gateway.service import GenerationService


class Lifecycle:
    """Joins the engine's stage with the gateway's own: the tokenizer loads, SIGTERM arrives.

    The fronts ask for `service()` per request, because it only exists once the engine has said
    which model it loaded.
    """

    def __init__(self, link: EngineLink) -> None:
        self.link = link
        self.draining = False
        self._service: GenerationService | None = None

    def open(self, service: GenerationService) -> None:
        """The model is known: requests can be served from now on."""
        self._service = service

    def begin_drain(self) -> None:
        """Refuses new requests from now on; running ones go on."""
        self.draining = True
        if self._service is not None:
            self._service.stop_accepting()

    @property
    def stage(self) -> str:
        """loading, ready, failed, stopping (the engine's words) or draining."""
        if self.draining:
            return "draining"
        stage = self.link.status.stage
        return "loading" if stage == "ready" and self._service is None else stage

    def service(self) -> GenerationService:
        """The service. Raises RequestError(UNAVAILABLE) naming the stage when it is not ready."""
        stage = self.stage
        if stage == "ready" and self._service is not None:
            return self._service
        detail = self.link.status.detail
        text = f"the server is not ready: {stage}" + (f" ({detail})" if detail else "")
        raise RequestError(text, code=ErrorCode.UNAVAILABLE)
