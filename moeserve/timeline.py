"""A timeline of what runs when, for Perfetto (https://ui.perfetto.dev) or chrome://tracing.

One Timeline goes to everything that has something to show, and records while somebody asks for it.
The file is the Trace Event Format's JSON: complete events ("ph": "X"), times in microseconds.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, NamedTuple

import msgspec

#: about 30 MB of JSON; what comes after is counted and left out
MAX_SPANS: Final = 200_000

ENGINE: Final = "moeserve engine"

_NOTHING: Final[AbstractContextManager[None]] = nullcontext()


class Span(NamedTuple):
    """track: the name of the thread, or of the link or device. Times: of time.perf_counter(), or,
    with another process than the engine, of the clock that this one goes by."""

    name: str
    track: str
    start_s: float
    end_s: float
    details: dict[str, Any]
    process: str = ENGINE


class Timeline:
    """Records spans between `start` and `stop`. Threads may add spans at any time.

    lap_s: the end of the last lap, so that a span around laps begins and ends exactly with them:
    spans of one track must lie inside each other, or beside.
    """

    def __init__(self) -> None:
        self.recording = False
        self._spans: list[Span] = []
        self._num_dropped = 0
        self.lap_s = 0.0

    def lap(self, name: str, **details: Any) -> None:
        """What the engine's thread did since its last lap, or since `start`."""
        if self.recording:
            now_s = time.perf_counter()
            self.add_here(name, self.lap_s, now_s, **details)
            self.lap_s = now_s

    def span(self, name: str, **details: Any) -> AbstractContextManager[None]:
        """`with timeline.span("router", layer=3):` on the track of this thread."""
        return _Running(self, name, details) if self.recording else _NOTHING

    def add(
        self,
        name: str,
        track: str,
        start_s: float,
        end_s: float,
        process: str = ENGINE,
        **details: Any,
    ) -> None:
        """What was measured elsewhere, such as a copy, or the work of a device."""
        if not self.recording:
            return
        if len(self._spans) < MAX_SPANS:
            self._spans.append(Span(name, track, start_s, end_s, details, process))
        else:
            self._num_dropped += 1

    def add_here(self, name: str, start_s: float, end_s: float, **details: Any) -> None:
        """As `add`, on the track of this thread."""
        if self.recording:
            self.add(name, threading.current_thread().name, start_s, end_s, **details)

    def start(self) -> None:
        """Forgets what was recorded before."""
        self._spans, self._num_dropped = [], 0
        self.lap_s = time.perf_counter()
        self.recording = True

    def stop(self) -> Recording:
        self.recording = False
        recording = Recording(self._spans, self._num_dropped)
        self._spans, self._num_dropped = [], 0
        return recording


class Recording(NamedTuple):
    spans: list[Span]
    num_dropped: int

    def to_json(self) -> bytes:
        """The Trace Event Format; time 0 is the start of a process' first span."""
        spans = sorted(self.spans, key=lambda span: span.start_s)
        processes = list(dict.fromkeys([ENGINE, *(span.process for span in spans)]))
        tracks = list(dict.fromkeys((span.process, span.track) for span in spans))
        pids = {process: number for number, process in enumerate(processes, start=os.getpid())}
        tids = {track: number for number, track in enumerate(tracks, start=1)}
        zeros_s = {span.process: span.start_s for span in reversed(spans)}  # the first one stays
        events = [_about("process_name", pids[process], 0, name=process) for process in processes]
        for (process, track), number in tids.items():
            events.append(_about("thread_name", pids[process], number, name=track))
            events.append(_about("thread_sort_index", pids[process], number, sort_index=number))
        events += [
            {
                "name": span.name,
                "cat": str(span.details.get("urgency", "step")),
                "ph": "X",
                "ts": round((span.start_s - zeros_s[span.process]) * 1e6, 3),
                "dur": round((span.end_s - span.start_s) * 1e6, 3),
                "pid": pids[span.process],
                "tid": tids[span.process, span.track],
                "args": span.details,
            }
            for span in spans
        ]
        about = {"spans": len(self.spans), "spans_left_out": self.num_dropped}
        return msgspec.json.encode(
            {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
        )


class _Running:
    """A span that ends with its context."""

    def __init__(self, timeline: Timeline, name: str, details: dict[str, Any]) -> None:
        self._timeline = timeline
        self._name = name
        self._details = details

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        end_s = time.perf_counter()
        self._timeline.add_here(self._name, self._start_s, end_s, **self._details)


def _about(kind: str, process: int, thread: int, **details: Any) -> dict[str, Any]:
    """A metadata event."""
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": details}
