"""`LLM`: the engine in this process, without gateway. Same checks, same text, same tokens."""

from __future__ import annotations

import dataclasses
import difflib
import signal
import threading
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from moeserve.config import EngineConfig, ExpertConfig, KvConfig, ModelConfig, SchedulerConfig
from moeserve.core import (
    ConfigError,
    EngineRequest,
    FinishReason,
    ModelInfo,
    MoeserveError,
    RequestError,
    SamplingParams,
)
from moeserve.environment import tune_native_libraries
from moeserve.text.assets import TextAssets
from moeserve.text.checks import check_tokenizer_file
from moeserve.text.events import TextEvent
from moeserve.text.generation import GenerationState
from moeserve.text.prepare import prepare
from moeserve.text.request import GenerateRequest, RequestLimits
from moeserve.text.result import Answer, Result, ResultCollector
from moeserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moeserve.engine.engine import Engine

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]  # text, token ids or a conversation
Params: TypeAlias = SamplingParams | Mapping[str, Any] | None

__all__ = ["LLM", "Answer", "Result"]

SETTINGS: dict[str, type] = {
    "model": ModelConfig,
    "kv": KvConfig,
    "scheduler": SchedulerConfig,
    "experts": ExpertConfig,
}
OFFLINE_LIMITS = RequestLimits(max_n=4096, max_stop_strings=256, max_stop_chars=4096)


class LLM:
    """A model for offline use.

        with LLM() as llm:  # the bundled model; or LLM("path or hub id", dtype="bfloat16")
            print(llm.generate("Once upon a time", max_tokens=50)[0].text)

    An interrupt (Ctrl-C) or an early end of a stream takes the request out of the engine; the LLM
    stays usable. Several threads may call it; the engine does one step at a time for all of them.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        progress: Callable[[str, float], None] | None = None,
        limits: RequestLimits = OFFLINE_LIMITS,
        **settings: Any,
    ) -> None:
        """Loads a model.

        settings: fields of ModelConfig, KvConfig, SchedulerConfig and ExpertConfig.
        progress: called with (stage, 0..1) while loading.
        Raises ConfigError for a setting that does not exist or is out of range, ModelError for a
        model that cannot be served.
        """
        if model is not None:
            settings["model"] = model
        self._open(engine_config(settings), progress, limits)

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        progress: Callable[[str, float], None] | None = None,
        limits: RequestLimits = OFFLINE_LIMITS,
    ) -> LLM:
        """As the constructor, from ready-made settings."""
        llm = cls.__new__(cls)
        llm._open(config, progress, limits)
        return llm

    def _open(
        self,
        config: EngineConfig,
        progress: Callable[[str, float], None] | None,
        limits: RequestLimits,
    ) -> None:
        tune_native_libraries()  # without effect where the caller has imported torch already
        from moeserve.engine.engine import Engine

        engine = Engine.from_config(config, progress, check_tokenizer_file)
        self.info: ModelInfo = engine.info
        self._assets = TextAssets.load(self.info.path)
        self._limits = limits
        self._max_in_engine = config.scheduler.max_waiting
        self._engine: Engine | None = engine
        self._lock = threading.Lock()  # held by whoever uses the engine
        self._jobs: dict[str, _Job] = {}  # by id of the engine request

    @property
    def tokenizer(self) -> Tokenizer:
        return self._assets.tokenizer

    # -- generating ------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, **given: Any
    ) -> list[Result]:
        """Answers to one prompt or to many, which run together.

        prompts: a text, a list of token ids, a conversation (list of messages), or a list of those.
        params: SamplingParams, or any of its fields and `n`, `stop`, `include_stop`,
            `skip_special_tokens` by name; `given` are the same, and win.
        Raises RequestError before anything runs if one of the prompts or parameters is wrong.
        """
        each = [prompts] if _is_one_prompt(prompts) else list(prompts)
        jobs = [
            self._prepare(prompt, params, given, f"prompts[{i}]" if len(each) > 1 else None)
            for i, prompt in enumerate(each)
        ]
        collected = [ResultCollector(job.state) for job in jobs]
        with closing(self._run(jobs)) as numbered:
            for number, event in numbered:
                collected[number].add(event)
        return [collector.result() for collector in collected]

    def chat(self, messages: Sequence[Message], params: Params = None, **given: Any) -> Result:
        """The answer to a conversation: messages with `role` and `content`."""
        return self.generate(messages, params, **given)[0]

    def stream(
        self, prompt: Prompt, params: Params = None, **given: Any
    ) -> Generator[TextEvent, None, None]:
        """The events of one prompt as they arise. Closing the iterator ends the generation.

        The request is checked here, not at the first event. Raises RequestError.
        """
        job = self._prepare(prompt, params, given, None)
        return self._stream(job)

    def close(self) -> None:
        """Frees the model. Further calls raise MoeserveError. Safe to call again."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
            self._engine = None
        self._assets.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- running ---------------------------------------------------------------------------------

    def _prepare(
        self, prompt: Any, params: Params, given: Mapping[str, Any], name: str | None
    ) -> _Job:
        """name: what to call the prompt in an error, if there are several."""
        as_dict = msgspec.structs.asdict(params) if isinstance(params, SamplingParams) else params
        is_text = isinstance(prompt, str | bytes)
        is_chat = not is_text and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        extra = {key: given[key] for key in REQUEST_FIELDS if key in given}
        request = GenerateRequest(
            request_id=uuid.uuid4().hex,
            prompt=prompt if is_text else None,
            messages=prompt if is_chat else None,
            token_ids=None if is_text or is_chat else prompt,
            params={
                **(as_dict or {}),
                **{key: value for key, value in given.items() if key not in extra},
            },
            **extra,
        )
        try:
            prepared = prepare(request, self._assets, self.info, self._limits)
        except RequestError as error:
            if name is None:
                raise
            raise RequestError(f"{name}: {error}", code=error.code, field=error.field) from error
        return _Job(GenerationState(prepared, self.tokenizer))

    def _run(self, jobs: list[_Job]) -> Generator[tuple[int, TextEvent], None, None]:
        """Events of the jobs with the job's number, until all are finished."""
        to_add = deque(
            (job, request) for job in jobs for request in job.state.prepared.engine_requests
        )
        try:
            while True:
                for number, job in enumerate(jobs):
                    while job.events:
                        yield number, job.events.popleft()
                    if job.error is not None:
                        raise job.error
                if all(job.state.finished for job in jobs):
                    return
                with _interrupt_later(), self._lock:
                    if not any(job.has_news for job in jobs):  # else another thread's step did it
                        self._add(to_add)
                        self._step()
        finally:
            with _interrupt_later(), self._lock:
                self._abandon(jobs)

    def _stream(self, job: _Job) -> Generator[TextEvent, None, None]:
        with closing(self._run([job])) as numbered:
            for _, event in numbered:
                yield event

    def _use_engine(self) -> Engine:
        if self._engine is None:
            raise MoeserveError("this LLM is closed")
        return self._engine

    def _add(self, waiting: deque[tuple[_Job, EngineRequest]]) -> None:
        """Moves requests into the engine, as many as its queue takes."""
        engine = self._use_engine()
        while waiting and len(self._jobs) < self._max_in_engine:
            job, request = waiting.popleft()
            engine.add(request)
            self._jobs[request.request_id] = job

    def _step(self) -> None:
        """One step of the engine, for whoever's requests are in it."""
        engine = self._use_engine()
        for delta in engine.step():
            job = self._jobs[delta.request_id]
            if delta.finish_reason is not None:
                del self._jobs[delta.request_id]
            try:
                progress = job.state.feed(delta)
            except RequestError as error:
                job.error = error
                continue
            job.events.extend(progress.events)
            for request_id in progress.abort:
                engine.abort(request_id, FinishReason.STOP)
                self._jobs.pop(request_id, None)

    def _abandon(self, jobs: list[_Job]) -> None:
        """Takes what is left of these jobs out of the engine."""
        for job in jobs:
            for request in job.state.prepared.engine_requests:
                if self._jobs.pop(request.request_id, None) is not None and self._engine:
                    self._engine.abort(request.request_id)


#: arguments of `generate` that are no sampling parameters but fields of the request
REQUEST_FIELDS = (
    "add_special_tokens",
    "add_generation_prompt",
    "continue_final_message",
    "template_variables",
    "priority",
    "deadline_s",
)


@dataclass
class _Job:
    """One prompt that runs, and what nobody has fetched of it yet."""

    state: GenerationState
    events: deque[TextEvent] = field(default_factory=deque)
    error: RequestError | None = None

    @property
    def has_news(self) -> bool:
        return bool(self.events) or self.error is not None


def _is_one_prompt(prompts: Any) -> bool:
    """A text, or a list whose entries are token ids or messages."""
    if isinstance(prompts, str | bytes):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], int | Mapping)


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Lets Ctrl-C wait until the block is done, so that it never finds the engine mid-step.

    Only the main thread is ever interrupted, and only it may change signal handlers.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            previous(*caught[0])


def engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig from flat names. Raises ConfigError for a name that no room has."""
    owner = {
        entry.name: part for part, cls in SETTINGS.items() for entry in dataclasses.fields(cls)
    }
    parts: dict[str, dict[str, Any]] = {part: {} for part in SETTINGS}
    for name, value in settings.items():
        if name not in owner:
            near = difflib.get_close_matches(name, owner, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(owner))}"
            raise ConfigError(f"{name}: unknown setting", field=name, hint=hint)
        parts[owner[name]][name] = value
    return EngineConfig(**{part: cls(**parts[part]) for part, cls in SETTINGS.items()})
