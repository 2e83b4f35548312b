"""Runs generations for the fronts: checks, fans out, limits, drains. No HTTP, no ZeroMQ.

Data flow of one request: front -> `start` -> prepare (text room) -> EngineLink, one stream per
answer -> GenerationState (text room) -> one waiting event per answer -> front.
"""

from __future__ import annotations

import asyncio
import time

from moeserve.core import ErrorCode, ModelInfo, RequestError
from moeserve.gateway.engine_link import EngineLink
from moeserve.gateway.generation import AnswerRecord, Generation, ServiceObserver
from moeserve.text.assets import TextAssets
from moeserve.text.prepare import prepare
from moeserve.text.request import GenerateRequest, PreparedRequest, RequestLimits
from moeserve.text.tokenizer import Tokenizer

__all__ = ["AnswerRecord", "Generation", "GenerationService", "ServiceObserver"]

# Up to here tokenising takes less than a millisecond or two; beyond, a thread does it, so that the
# streams of other requests go on.
MAX_INLINE_CHARS = 2048


class GenerationService:
    """All running generations of one gateway. Lives in one event loop."""

    def __init__(
        self,
        link: EngineLink,
        limits: RequestLimits,
        *,
        assets: TextAssets,
        info: ModelInfo | None = None,
        max_running: int = 1024,
        observer: ServiceObserver | None = None,
    ) -> None:
        """info: default is what the link says, whose engine must be ready then.

        max_running: requests at once, those being tokenised included.
        """
        self.link = link
        self.limits = limits
        self.assets = assets
        self.info = _info_of(link) if info is None else info
        self._max_running = max_running
        self._observer = observer
        self._accepting = True
        self._starting: set[str] = set()
        self._running: dict[str, Generation] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def load(
        cls,
        link: EngineLink,
        limits: RequestLimits,
        *,
        max_running: int = 1024,
        observer: ServiceObserver | None = None,
    ) -> GenerationService:
        """Reads tokenizer and chat template of the model that the engine has loaded.

        Raises RequestError(UNAVAILABLE) if no engine is ready, ModelError for broken files.
        """
        info = _info_of(link)
        assets = await asyncio.to_thread(TextAssets.load, info.path)
        return cls(
            link, limits, assets=assets, info=info, max_running=max_running, observer=observer
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self.assets.tokenizer

    @property
    def num_running(self) -> int:
        """Requests that the engine has not finished with, and those being tokenised."""
        return len(self._running) + len(self._starting)

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; a long one does not hold up the event loop."""
        if len(text) <= MAX_INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    async def start(self, request: GenerateRequest) -> Generation:
        """Checks a request and hands it to the engine.

        Raises RequestError, whose code says why: INVALID, CONTEXT_LENGTH, UNKNOWN_MODEL,
        OVERLOADED, UNAVAILABLE or DEADLINE.
        """
        try:
            return await self._start(request)
        except RequestError as error:
            if self._observer is not None:
                self._observer.request_refused(error.code)
            raise

    async def _start(self, request: GenerateRequest) -> Generation:
        self._check_room(request)
        self._starting.add(request.request_id)
        self._idle.clear()
        try:
            prepared = await self._prepare(request)
            if request.deadline_s is not None and request.deadline_s <= time.time():
                raise RequestError("deadline: it has already passed", code=ErrorCode.DEADLINE)
            generation = Generation(prepared, self.tokenizer, self.link, self._observer)
            generation.run(self._ended)
            self._running[request.request_id] = generation
        finally:
            self._starting.discard(request.request_id)
            self._check_idle()
        if self._observer is not None:
            self._observer.request_started(len(prepared.prompt_token_ids))
        return generation

    def _check_room(self, request: GenerateRequest) -> None:
        if not self._accepting:
            raise RequestError(
                "the server is shutting down and takes no new requests",
                code=ErrorCode.UNAVAILABLE,
            )
        if request.request_id in self._starting or request.request_id in self._running:
            raise RequestError(
                f"request_id: {request.request_id!r} is still running", field="request_id"
            )
        if self.num_running >= self._max_running:
            raise RequestError(
                f"the server is busy: {self.num_running} requests are running, "
                f"at most {self._max_running}",
                code=ErrorCode.OVERLOADED,
                hint="try again later",
            )

    async def _prepare(self, request: GenerateRequest) -> PreparedRequest:
        given = request.prompt if request.prompt is not None else request.token_ids
        # Chat templates render in another process, which a thread must wait for.
        inline = (
            request.messages is None
            and isinstance(given, str | bytes | list | tuple)
            and len(given) <= MAX_INLINE_CHARS
        )
        if inline:
            return prepare(request, self.assets, self.info, self.limits)
        return await asyncio.to_thread(prepare, request, self.assets, self.info, self.limits)

    def _ended(self, generation: Generation) -> None:
        del self._running[generation.request_id]
        self._check_idle()

    def _check_idle(self) -> None:
        if not self.num_running:
            self._idle.set()

    # -- shutting down ---------------------------------------------------------------------------

    def stop_accepting(self) -> None:
        """Refuses new requests from now on; the running ones go on."""
        self._accepting = False

    async def drain(self, timeout_s: float) -> bool:
        """Waits until no request runs; False when that took longer than timeout_s."""
        if self._idle.is_set():
            return True  # with a timeout of 0 wait_for would not even look
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def cancel_all(self) -> None:
        """Ends every running request."""
        for generation in list(self._running.values()):
            generation.cancel()


def _info_of(link: EngineLink) -> ModelInfo:
    status = link.status
    if status.info is None:
        raise RequestError(f"the engine is {status.stage}", code=ErrorCode.UNAVAILABLE)
    return status.info
