"""The events of a request joined into whole answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeserve.core import FinishReason
from moeserve.messages import Timing, Usage
from moeserve.text.events import TextEvent, TokenText
from moeserve.text.generation import GenerationState


@dataclass
class Answer:
    """One of the `n` answers to a prompt. Its fields are those of the events, joined."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenText] | None = None
    finish_reason: FinishReason | None = None
    stop: str | int | None = None


@dataclass(frozen=True)
class Result:
    """What came of one prompt."""

    prompt_token_ids: list[int]
    prompt_logprobs: tuple[TokenText, ...] | None
    answers: list[Answer]
    usage: Usage
    timing: Timing

    @property
    def text(self) -> str:
        """The text of the first answer."""
        return self.answers[0].text


class ResultCollector:
    """Joins the events of one prompt."""

    def __init__(self, state: GenerationState) -> None:
        self._state = state
        num_answers = state.prepared.num_answers
        self._answers = [Answer() for _ in range(num_answers)]
        self._texts: list[list[str]] = [[] for _ in range(num_answers)]

    def add(self, event: TextEvent) -> None:
        answer = self._answers[event.index]
        self._texts[event.index].append(event.text)
        answer.token_ids.extend(event.token_ids)
        if event.logprobs is not None:
            answer.logprobs = answer.logprobs or []
            answer.logprobs.extend(event.logprobs)
        if event.finish_reason is not None:
            answer.finish_reason = event.finish_reason
            answer.stop = event.stop

    def result(self) -> Result:
        for answer, texts in zip(self._answers, self._texts, strict=True):
            answer.text = "".join(texts)
        state = self._state
        return Result(
            prompt_token_ids=state.prepared.prompt_token_ids,
            prompt_logprobs=state.prompt_logprobs,
            answers=self._answers,
            usage=state.usage,
            timing=state.timing,
        )
