"""One running request: its engine streams merged into one iterator of text events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moeserve.core import (
    EngineDelta,
    EngineTiming,
    ErrorCode,
    FinishReason,
    RequestError,
)
from moeserve.gateway.engine_link import EngineLink, EngineStream
from moeserve.messages import Timing, Usage
from moeserve.text.events import TextEvent, TokenText
from moeserve.text.generation import GenerationState
from moeserve.text.request import PreparedRequest
from moeserve.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class AnswerRecord:
    """One finished answer, for metrics. Times in seconds from receipt of the request."""

    reason: FinishReason
    num_tokens: int
    first_token_s: float | None
    last_token_s: float | None
    total_s: float
    engine: EngineTiming | None  # None when the engine did not end it


class ServiceObserver(Protocol):
    """Hears what happens, for metrics. Called in the event loop; must not block or raise."""

    def request_started(self, prompt_tokens: int) -> None: ...

    def request_refused(self, code: ErrorCode) -> None: ...

    def first_token(self, seconds: float) -> None:
        """Receipt to first token, once per request."""

    def token_gap(self, seconds: float, tokens: int) -> None:
        """Time between two deltas of an answer, the later of which brought so many tokens."""

    def answer_finished(self, record: AnswerRecord) -> None: ...

    def request_finished(self, usage: Usage, timing: Timing) -> None: ...


class _Waiting:
    """What the reader has not fetched yet of one answer, merged."""

    def __init__(self, event: TextEvent) -> None:
        self._last = event
        self._texts = [event.text]
        self._token_ids = [*event.token_ids]
        self._logprobs = None if event.logprobs is None else [*event.logprobs]

    def add(self, event: TextEvent) -> None:
        self._last = event
        self._texts.append(event.text)
        self._token_ids.extend(event.token_ids)
        if self._logprobs is not None and event.logprobs is not None:
            self._logprobs.extend(event.logprobs)

    def event(self) -> TextEvent:
        return TextEvent(
            index=self._last.index,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            finish_reason=self._last.finish_reason,
            stop=self._last.stop,
        )


class _Clock:
    """Token times of one answer, relative to the receipt of its request."""

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s: float | None = None


class Generation:
    """A running request: an async iterator over the events of all its answers. One reader.

    Answers come interleaved, each event naming its answer; the last event of an answer has a
    finish_reason. At most one event per answer waits, later ones are merged into it, so a slow
    reader costs no more memory than the answers themselves.

    Iterating raises RequestError when the engine fails the request. Leaving early: `cancel()`.
    """

    def __init__(
        self,
        prepared: PreparedRequest,
        tokenizer: Tokenizer,
        link: EngineLink,
        observer: ServiceObserver | None,
    ) -> None:
        self.prepared = prepared
        self._state = GenerationState(prepared, tokenizer)
        self._link = link
        self._observer = observer
        self._waiting: dict[int, _Waiting] = {}
        self._news = asyncio.Event()
        self._error: RequestError | None = None
        self._clocks = [_Clock() for _ in prepared.engine_requests]
        self._index_of = {r.request_id: i for i, r in enumerate(prepared.engine_requests)}
        self._open_ids = dict.fromkeys(self._index_of)  # of answers that have not ended
        self._reported = False
        self._task: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def request_id(self) -> str:
        return self.prepared.request_id

    @property
    def prompt_text(self) -> str:
        """The prompt as sent, or the text of its tokens."""
        return self._state.prompt_text

    @property
    def prompt_logprobs(self) -> tuple[TokenText, ...] | None:
        """One per prompt token, if asked for; known before the first event of any answer."""
        return self._state.prompt_logprobs

    @property
    def usage(self) -> Usage:
        """Tokens so far; final after the last event."""
        return self._state.usage

    @property
    def timing(self) -> Timing:
        """Milliseconds so far; final after the last event."""
        return self._state.timing

    @property
    def finished(self) -> bool:
        """True when no further event will arise (some may still wait to be read)."""
        return self._error is not None or not self._open_ids

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> TextEvent:
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if not self._open_ids:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        index = next(iter(self._waiting))  # the answer that has waited longest
        return self._waiting.pop(index).event()

    def cancel(self) -> None:
        """Ends all answers now, here and in the engine. Does nothing after the end."""
        self._end(FinishReason.CANCELLED)

    async def aclose(self) -> None:
        self.cancel()

    # -- for the service -------------------------------------------------------------------------

    def run(self, on_end: Callable[[Generation], None]) -> None:
        """Submits to the engine and starts reading. Raises what EngineLink.submit raises.

        on_end: called once the engine is done with the request, however it ended.
        """
        streams: dict[str, EngineStream] = {}
        try:
            for request in self.prepared.engine_requests:
                streams[request.request_id] = self._link.submit(request)
        except RequestError:
            for request_id in streams:
                self._link.abort(request_id)
            raise
        deadline_s = self.prepared.engine_requests[0].deadline_s
        if deadline_s is not None:
            loop = asyncio.get_running_loop()
            # The engine keeps the deadline too; but it may be in a long step when it passes.
            self._deadline = loop.call_later(
                max(deadline_s - time.time(), 0), self._end, FinishReason.DEADLINE
            )
        self._task = asyncio.create_task(
            self._read(list(streams.values())), name=f"generation {self.request_id}"
        )
        self._task.add_done_callback(lambda _: on_end(self))

    async def _read(self, streams: list[EngineStream]) -> None:
        try:
            await asyncio.gather(*map(self._read_one, streams))
        finally:
            if not self.finished:  # an error of ours, which the task reports; the reader must know
                self._fail(RequestError("internal error", code=ErrorCode.INTERNAL))
            if self._deadline is not None:
                self._deadline.cancel()

    async def _read_one(self, stream: EngineStream) -> None:
        async for delta in stream:
            self._take(delta)

    def _end(self, reason: FinishReason) -> None:
        for request_id in list(self._open_ids):
            if self._error is None:
                self._link.abort(request_id, reason)
                self._take(EngineDelta(request_id=request_id, finish_reason=reason))

    def _fail(self, error: RequestError) -> None:
        for request_id in self._open_ids:
            self._link.abort(request_id)
        self._error = error
        self._report_end()
        self._news.set()

    def _take(self, delta: EngineDelta) -> None:
        if self.finished:
            return
        self._observe_tokens(delta)
        try:
            progress = self._state.feed(delta)
        except RequestError as error:
            self._open_ids.pop(delta.request_id, None)
            self._fail(error)
            return
        for request_id in progress.abort:
            self._link.abort(request_id, FinishReason.STOP)
        for event in progress.events:
            waiting = self._waiting.get(event.index)
            if waiting is None:
                self._waiting[event.index] = _Waiting(event)
            else:
                waiting.add(event)
            if event.finish_reason is not None:
                self._answer_ended(event, delta.timing)
        if progress.events:
            self._news.set()

    # -- metrics ---------------------------------------------------------------------------------

    def _observe_tokens(self, delta: EngineDelta) -> None:
        clock = self._clocks[self._index_of[delta.request_id]]
        if not delta.token_ids or delta.request_id not in self._open_ids:
            return
        now_s = time.monotonic() - self.prepared.received_s
        if self._observer is not None:
            if all(other.first_s is None for other in self._clocks):
                self._observer.first_token(now_s)
            if clock.last_s is not None:
                self._observer.token_gap(now_s - clock.last_s, len(delta.token_ids))
        clock.first_s = now_s if clock.first_s is None else clock.first_s
        clock.last_s = now_s

    def _answer_ended(self, event: TextEvent, engine: EngineTiming | None) -> None:
        clock = self._clocks[event.index]
        request_id = self.prepared.engine_requests[event.index].request_id
        del self._open_ids[request_id]
        if self._observer is not None and event.finish_reason is not None:
            self._observer.answer_finished(
                AnswerRecord(
                    reason=event.finish_reason,
                    num_tokens=self._state.num_tokens(event.index),
                    first_token_s=clock.first_s,
                    last_token_s=clock.last_s,
                    total_s=time.monotonic() - self.prepared.received_s,
                    engine=engine,
                )
            )
        if not self._open_ids:
            self._report_end()

    def _report_end(self) -> None:
        if self._observer is not None and not self._reported:
            self._observer.request_finished(self.usage, self.timing)
        self._reported = True
