"""Looks at a running engine and changes it: what `moeserve ctl` asks for."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from moeserve.control_messages import (
    MAX_TIMELINE_STEPS,
    MAX_USE_STEPS,
    CacheResized,
    ControlReply,
    ControlRequest,
    EngineControl,
    EngineControlEnd,
    ExpertUse,
    GetStats,
    RecordExpertUse,
    RecordTimeline,
    ResizeCache,
    Stats,
    TimelineRecorded,
)
from moeserve.core import ErrorCode, MoeserveError, RequestError
from moeserve.engine.channel import EngineChannel
from moeserve.engine.engine import Engine
from moeserve.experts.use_counts import UseCounts
from moeserve.messages import Error
from moeserve.stats import CacheStats

log = logging.getLogger(__name__)


class _Answer(NamedTuple):
    reply: ControlReply
    frames: tuple[bytes, ...] = ()


class _Recording(ABC):
    """What is collected over some steps. Begins with its construction."""

    def __init__(self, request: RecordExpertUse | RecordTimeline) -> None:
        self.request_id = request.request_id
        self.wanted_steps = request.num_steps
        self.num_steps = 0

    @abstractmethod
    def end(self) -> _Answer:
        """Stops it; what was collected."""


class _TimelineRecording(_Recording):
    def __init__(self, request: RecordTimeline, engine: Engine) -> None:
        super().__init__(request)
        self._timeline = engine.timeline
        self._timeline.start()

    def end(self) -> _Answer:
        recorded = self._timeline.stop()
        reply = TimelineRecorded(request_id=self.request_id, num_steps=self.num_steps)
        return _Answer(reply, (recorded.to_json(),))


class _UseRecording(_Recording):
    def __init__(self, request: RecordExpertUse, engine: Engine) -> None:
        super().__init__(request)
        runtime = engine.loaded.runtime
        numbers = runtime.cache.numbers
        self._counts = UseCounts(dict(zip(numbers.layers, numbers.sizes, strict=True)))
        self._observers = runtime.observers
        self._observers.append(self._counts)

    def end(self) -> _Answer:
        self._observers.remove(self._counts)
        uses = self._counts.by_layer()
        counts = np.concatenate([*uses.values(), np.zeros(0, np.int64)])
        reply = ExpertUse(
            request_id=self.request_id,
            num_steps=self.num_steps,
            layers=list(uses),
            num_experts=[len(of_layer) for of_layer in uses.values()],
        )
        return _Answer(reply, (counts.astype("<i8").tobytes(),))


class Controls:
    """Answers control requests between two steps, on the engine's thread."""

    def __init__(self, engine: Engine, channel: EngineChannel) -> None:
        self._engine = engine
        self._channel = channel
        self._started_s = time.monotonic()
        self._recordings: dict[int, _Recording] = {}

    def take(self, command: EngineControl | EngineControlEnd) -> None:
        """Does what is asked and answers it; a recording is answered when it has its steps."""
        if isinstance(command, EngineControlEnd):
            if command.number in self._recordings:
                self._end_recording(command.number)
            return
        request = command.request
        try:
            if isinstance(request, RecordTimeline | RecordExpertUse):
                self._recordings[command.number] = self._start_recording(request)
            else:
                self._reply(command.number, self._answer(request))
        except MoeserveError as error:
            self._reply(command.number, _Answer(_refusal(request, error)))

    def step_done(self) -> None:
        """Counts the steps of recordings."""
        for number, recording in list(self._recordings.items()):
            recording.num_steps += 1
            if recording.num_steps == recording.wanted_steps:
                self._end_recording(number)

    def _answer(self, request: GetStats | ResizeCache) -> _Answer:
        if isinstance(request, GetStats):
            return _Answer(self._stats(request))
        return _Answer(self._resize(request))

    def _stats(self, request: GetStats) -> Stats:
        info = self._engine.info
        return Stats(
            request_id=request.request_id,
            model=info.name,
            uptime_s=time.monotonic() - self._started_s,
            notes=info.notes,
            engine=self._engine.stats(fresh=True),
        )

    def _resize(self, request: ResizeCache) -> CacheResized:
        before = self._host_slots()
        self._engine.resize_host_memory(request.host_memory_bytes)
        after = self._host_slots()
        assert before is not None, "only slots of the host tier are resized"
        assert after is not None, "they do not go away"
        log.info(
            "host memory is %d bytes now: %d slots for experts, %d before",
            *(request.host_memory_bytes, after.num_slots, before.num_slots),
        )
        self._channel.set_stage("ready", progress=1.0, info=self._engine.info)
        return CacheResized(
            request_id=request.request_id,
            host_memory_bytes=request.host_memory_bytes,
            weights_bytes=self._engine.loaded.resident_bytes,
            kv_bytes=self._engine.kv_bytes,
            kv_limit_bytes=self._engine.memory.limit_bytes,
            slot_bytes=after.slot_bytes,
            slots_before=before.num_slots,
            slots=after.num_slots,
            slots_owed=after.num_owed,
            num_experts=sum(self._engine.loaded.runtime.cache.numbers.sizes),
        )

    def _host_slots(self) -> CacheStats | None:
        caches, _ = self._engine.loaded.runtime.supply.stats()
        return next((cache for cache in caches if cache.tier == "host"), None)

    def _start_recording(self, request: RecordTimeline | RecordExpertUse) -> _Recording:
        most = MAX_TIMELINE_STEPS if isinstance(request, RecordTimeline) else MAX_USE_STEPS
        if not 1 <= request.num_steps <= most:
            raise RequestError(
                f"num_steps: {request.num_steps} is out of range; allowed: 1 to {most}",
                field="num_steps",
            )
        if isinstance(request, RecordExpertUse):
            return _UseRecording(request, self._engine)
        if self._engine.timeline.recording:
            raise RequestError(
                "a timeline is being recorded already",
                code=ErrorCode.OVERLOADED,
                hint="wait for its end",
            )
        return _TimelineRecording(request, self._engine)

    def _end_recording(self, number: int) -> None:
        self._reply(number, self._recordings.pop(number).end())

    def _reply(self, number: int, answer: _Answer) -> None:
        self._channel.answer(number, answer.reply, *answer.frames)


def _refusal(request: ControlRequest, error: MoeserveError) -> Error:
    return Error(
        request_id=request.request_id,
        code=error.code,
        message=str(error),
        field=error.field,
        hint=error.hint,
    )
