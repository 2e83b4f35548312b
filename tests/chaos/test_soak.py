"""scripts/soak.py, shortened: ten seconds of load against a real server."""

from __future__ import annotations

import json

import pytest
import soak


def test_ten_seconds_of_load(capsys: pytest.CaptureFixture[str]) -> None:
    # Ten seconds are too short for flat memory: allocators still warm up. `make soak` is strict.
    status = soak.main(["--seconds", "10", "--streams", "24", "--slack", "0.5"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["violations"] == []
    assert status == 0
    assert set(report["idle"].values()) == {0.0}
    for way in ("zmq", "http"):
        assert report["outcomes"][f"{way} completed"] > 0
