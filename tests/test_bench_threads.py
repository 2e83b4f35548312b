"""scripts/bench_threads.py: what it counts, and one row against a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from bench_threads import Counts, Rates, Setup, median, rates, setups, switches

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="context switches are read from Linux' /proc"
)


def test_a_thread_that_sleeps_switches_voluntarily() -> None:
    def sleep_often() -> None:
        for _ in range(50):
            time.sleep(0.0001)
        slept.set()
        leave.wait(30)

    slept, leave = threading.Event(), threading.Event()
    before, _ = switches(os.getpid())
    thread = threading.Thread(target=sleep_often)
    thread.start()
    slept.wait(30)
    after, involuntary = switches(os.getpid())  # while the thread is still there to be counted
    leave.set()
    thread.join()
    assert after - before >= 50
    assert involuntary >= 0


def test_rates_are_differences_per_second() -> None:
    before = Counts(10.0, 100, 5, 7, 1.0, 2.0)
    after = Counts(12.0, 500, 9, 17, 4.0, 3.0)
    assert rates(before, after) == Rates(200.0, 2.0, 5.0, 1.5, 0.5)


def test_the_median_window_is_one_that_was_measured() -> None:
    windows = [Rates(tokens, tokens + 1, 0, 0, 0) for tokens in (30.0, 10.0, 20.0, 40.0)]
    assert median(windows) == Rates(20.0, 21.0, 0, 0, 0)


def test_rows() -> None:
    names = [setup.name for setup in setups(2)]
    assert len(names) == len(set(names))
    assert Setup("native", 2, 100, pinned=True).flags == [
        *("--cpu-backend", "native", "--num-threads", "2", "--spin-us", "100", "--pin-threads")
    ]


def test_one_row_against_a_real_server() -> None:
    arguments = ["--threads", "2", "--streams", "3", "--seconds", "0.5", "--repeats", "1"]
    script = Path(__file__).parents[1] / "scripts" / "bench_threads.py"
    command = [sys.executable, str(script), *arguments, "--only", "native, 2 threads, spin 0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    (row,) = report["results"].values()
    assert row["tokens"] > 0
    assert row["voluntary"] > 0
    assert row["engine_cores"] > 0
    assert "| native, 2 threads, spin 0 us |" in done.stdout
