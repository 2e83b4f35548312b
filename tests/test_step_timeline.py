"""Timelines: what is recorded, what the file says, and that nothing is recorded unasked."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from moeserve import timeline as timeline_room
from moeserve.timeline import Recording, Timeline


def events(recording: Recording) -> list[dict[str, Any]]:
    """The complete events of the file, as another program reads it."""
    content = json.loads(recording.to_json())
    assert set(content) == {"traceEvents", "displayTimeUnit", "otherData"}
    found = [event for event in content["traceEvents"] if event["ph"] == "X"]
    names = {
        event["tid"]: event["args"]["name"]
        for event in content["traceEvents"]
        if event["name"] == "thread_name"
    }
    for event in found:
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert isinstance(event["args"], dict)
        event["track"] = names[event["tid"]]
    return found


def test_records_only_while_it_is_asked_to() -> None:
    timeline = Timeline()
    with timeline.span("before"):
        timeline.lap("before")
    timeline.start()
    with timeline.span("inside", layer=3):
        pass
    open_at_the_end = timeline.span("cut")
    open_at_the_end.__enter__()
    found = events(timeline.stop())
    open_at_the_end.__exit__(None, None, None)
    assert [(e["name"], e["args"]) for e in found] == [("inside", {"layer": 3})]
    timeline.add("after", "link", 0.0, 1.0)
    timeline.start()
    assert timeline.stop() == Recording([], 0)


def test_laps_follow_each_other_without_gaps() -> None:
    timeline = Timeline()
    timeline.start()
    start_s = timeline.lap_s
    for name in "abc":
        timeline.lap(name)
    timeline.add_here("around", start_s, timeline.lap_s)
    recording = timeline.stop()
    *laps, around = recording.spans
    assert [lap.name for lap in laps] == ["a", "b", "c"]
    assert laps[0].start_s == around.start_s
    assert laps[0].end_s == laps[1].start_s
    assert laps[1].end_s == laps[2].start_s
    assert laps[2].end_s == around.end_s
    names = [event["name"] for event in events(recording)]
    assert names[0] in ("a", "around")  # both begin there
    assert len(names) == 4


def test_threads_have_tracks_of_their_own() -> None:
    timeline = Timeline()
    timeline.start()

    def work() -> None:
        for number in range(100):
            with timeline.span("read", urgency="demand", expert=number):
                time.sleep(0)

    threads = [threading.Thread(target=work, name=f"transfer-{n}") for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    timeline.add("copy", "link", 1.0, 1.5)
    found = events(timeline.stop())
    tracks = {track: [e for e in found if e["track"] == track] for track in ("link", "transfer-1")}
    assert [e["args"]["expert"] for e in tracks["transfer-1"]] == list(range(100))
    assert {e["cat"] for e in tracks["transfer-1"]} == {"demand"}
    assert tracks["link"][0]["dur"] == 500_000
    assert len(found) == 301


def test_another_clock_is_another_process() -> None:
    timeline = Timeline()
    timeline.start()
    with timeline.span("here"):
        pass
    timeline.add("there", "link", 5.0, 6.0, "emulated", urgency="prefetch")
    timeline.add("there", "link", 7.0, 7.5, "emulated", urgency="demand")
    found = events(timeline.stop())
    here = [event for event in found if event["name"] == "here"]
    there = [event for event in found if event["name"] == "there"]
    assert here[0]["pid"] != there[0]["pid"]
    assert [(event["ts"], event["dur"]) for event in there] == [(0, 1e6), (2e6, 5e5)]
    assert here[0]["ts"] == 0


def test_a_long_recording_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_room, "MAX_SPANS", 10)
    timeline = Timeline()
    timeline.start()
    for number in range(25):
        timeline.add("x", "track", number, number + 1)
    recording = timeline.stop()
    assert len(events(recording)) == 10
    about = json.loads(recording.to_json())["otherData"]
    assert about == {"spans": 10, "spans_left_out": 15}
