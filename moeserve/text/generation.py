"""From the engine's token deltas to text events: one `GenerationState` per request.

No clock of its own, no transport: whoever runs the request feeds deltas and passes the events on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from moeserve.core import EngineDelta, ErrorCode, FinishReason, RequestError, TokenLogprob
from moeserve.messages import Timing, Usage
from moeserve.text.detokenize import Detokenizer
from moeserve.text.events import TextEvent, TokenText, TopToken
from moeserve.text.request import PreparedRequest
from moeserve.text.stop import StopMatcher, StopStrings
from moeserve.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Progress:
    """What feeding a delta led to.

    abort: ids of engine requests to abort with reason STOP, because a stop string ended them.
    """

    events: list[TextEvent] = field(default_factory=list)
    abort: list[str] = field(default_factory=list)


class GenerationState:
    """The answers of one request as they grow."""

    def __init__(
        self,
        prepared: PreparedRequest,
        tokenizer: Tokenizer,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """now: the clock of `prepared.received_s`."""
        stops = StopStrings(prepared.stop)
        self.prepared = prepared
        self.prompt_logprobs: tuple[TokenText, ...] | None = None
        self._tokenizer = tokenizer
        self._now = now
        self._answers = {
            engine_request.request_id: _Answer(index, prepared, tokenizer, stops)
            for index, engine_request in enumerate(prepared.engine_requests)
        }
        self._first_id = prepared.engine_requests[0].request_id
        wants_scores = prepared.engine_requests[0].params.prompt_logprobs is not None
        # Deltas of the other answers wait until answer 0 has brought the scores of the prompt, so
        # that a reader knows them before the first event of any answer. None: no need to wait.
        self._early: list[EngineDelta] | None = [] if wants_scores else None
        self._queued_s = 0.0
        self._first_token_s: float | None = None
        self._finished_s: float | None = None

    @property
    def prompt_text(self) -> str:
        """The prompt as the client sent it, or the text of its tokens."""
        if self.prepared.prompt is not None:
            return self.prepared.prompt
        return self._tokenizer.decode(self.prepared.prompt_token_ids, skip_special_tokens=False)

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self._answers.values())

    @property
    def usage(self) -> Usage:
        """Tokens so far. cached_tokens: prompt tokens that none of the answers had to compute."""
        answers = self._answers.values()
        return Usage(
            prompt_tokens=len(self.prepared.prompt_token_ids),
            completion_tokens=sum(answer.num_tokens for answer in answers),
            cached_tokens=min(answer.num_cached_tokens for answer in answers),
        )

    @property
    def timing(self) -> Timing:
        """Milliseconds so far. Without any token yet (or at all) ttft_ms is total_ms."""
        end_s = self._now() if self._finished_s is None else self._finished_s
        first_s = end_s if self._first_token_s is None else self._first_token_s
        received_s = self.prepared.received_s
        return Timing(
            queued_ms=1e3 * self._queued_s,
            ttft_ms=1e3 * (first_s - received_s),
            total_ms=1e3 * (end_s - received_s),
        )

    def num_tokens(self, index: int) -> int:
        """Tokens of one answer so far."""
        return self._answers[self.prepared.engine_requests[index].request_id].num_tokens

    def feed(self, delta: EngineDelta) -> Progress:
        """Takes one delta of one answer; deltas behind the end of an answer are dropped.

        Raises RequestError when the engine failed the request; it is over then, as a whole.
        """
        progress = Progress()
        failed = delta.finish_reason is FinishReason.ERROR
        if self._early is not None and delta.request_id != self._first_id and not failed:
            self._early.append(delta)
            return progress
        self._feed_one(delta, progress)
        scored = self.prompt_logprobs is not None or self._answers[self._first_id].finished
        if self._early is not None and scored:
            early, self._early = self._early, None
            for waiting in early:
                self._feed_one(waiting, progress)
        return progress

    def _feed_one(self, delta: EngineDelta, progress: Progress) -> None:
        answer = self._answers[delta.request_id]
        if answer.finished:
            return
        if delta.finish_reason is FinishReason.ERROR:
            raise RequestError(
                delta.error or "the engine failed the request",
                code=delta.error_code or ErrorCode.INTERNAL,
            )
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = self._score_prompt(delta.prompt_logprobs)
        if delta.token_ids and self._first_token_s is None:
            self._first_token_s = self._now()
        if delta.timing is not None:
            self._queued_s = max(self._queued_s, delta.timing.queued_s)
        event = answer.feed(delta)
        if event is None:
            return
        progress.events.append(event)
        if event.finish_reason is not None:
            if delta.finish_reason is None:
                progress.abort.append(delta.request_id)
            if self.finished:
                self._finished_s = self._now()

    def _score_prompt(self, scores: list[TokenLogprob | None]) -> tuple[TokenText, ...]:
        """Prompt logprobs with text. Offsets count from the start of `prompt_text`; tokens that the
        tokenizer put before it (bos) have offset 0."""
        token_ids = self.prepared.prompt_token_ids
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=False)
        offsets: list[int] = []
        for token_id in token_ids:
            offsets.append(detokenizer.num_chars)
            detokenizer.feed(token_id)
        detokenizer.finish()
        before = detokenizer.num_chars - len(self.prompt_text)
        return tuple(
            token_with_text(self._tokenizer, token_id, max(offset - before, 0), score)
            for token_id, offset, score in zip(token_ids, offsets, scores, strict=True)
        )


class _Answer:
    """One answer: detokenises, looks for stop strings, counts."""

    def __init__(
        self, index: int, prepared: PreparedRequest, tokenizer: Tokenizer, stops: StopStrings
    ) -> None:
        self._index = index
        self._params = prepared.engine_requests[index].params
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(
            tokenizer, prepared.prompt_token_ids, prepared.skip_special_tokens
        )
        self._matcher = StopMatcher(stops, prepared.include_stop)
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished = False

    def feed(self, delta: EngineDelta) -> TextEvent | None:
        """The event of a delta; None if nothing came of it."""
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        pieces: list[str] = []
        logprobs: list[TokenText] | None = None if self._params.logprobs is None else []
        stop: str | int | None = None
        num_used = 0
        for position, token_id in enumerate(delta.token_ids):
            if logprobs is not None and delta.logprobs is not None:
                offset = self._detokenizer.num_chars
                score = delta.logprobs[position]
                logprobs.append(token_with_text(self._tokenizer, token_id, offset, score))
            num_used += 1
            self.num_tokens += 1
            is_last = position == len(delta.token_ids) - 1
            if is_last and token_id == delta.stop_token_id:
                continue  # it stops the answer and is no part of its text
            stop = self._add_text(self._detokenizer.feed(token_id), pieces)
            if stop is not None:
                break
        reason = FinishReason.STOP if stop is not None else delta.finish_reason
        if reason is not None and stop is None:
            stop = self._add_text(self._detokenizer.finish(), pieces)
            if stop is not None:
                reason = FinishReason.STOP
            else:
                pieces.append(self._matcher.finish())
                if delta.stop_token_id in self._params.stop_token_ids:
                    stop = delta.stop_token_id
        self.finished = reason is not None
        if not (num_used or reason):
            return None
        return TextEvent(
            index=self._index,
            text="".join(pieces),
            token_ids=tuple(delta.token_ids[:num_used]),
            logprobs=None if logprobs is None else tuple(logprobs),
            finish_reason=reason,
            stop=stop,
        )

    def _add_text(self, text: str, pieces: list[str]) -> str | None:
        """Adds what may be given out; the stop string, if the text completes one.

        Before `min_tokens` nothing stops the answer, so that text is not searched at all.
        """
        if self.num_tokens < self._params.min_tokens:
            pieces.append(text)
            return None
        safe, stop = self._matcher.feed(text)
        pieces.append(safe)
        return stop


def token_with_text(
    tokenizer: Tokenizer, token_id: int, text_offset: int, score: TokenLogprob | None
) -> TokenText:
    """One token and its score, with the text of it and of its alternatives."""
    raw = tokenizer.token_bytes(token_id)
    top = () if score is None else tuple(_top_token(tokenizer, *entry) for entry in score.top)
    return TokenText(
        token_id=token_id,
        text=raw.decode("utf-8", "replace"),
        raw=raw,
        text_offset=text_offset,
        logprob=None if score is None else score.logprob,
        rank=None if score is None else score.rank,
        top=top,
    )


def _top_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopToken:
    raw = tokenizer.token_bytes(token_id)
    return TopToken(token_id, raw.decode("utf-8", "replace"), raw, logprob)
