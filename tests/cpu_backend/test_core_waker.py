"""Threads that keep cores awake while a step waits: when they run, where, and as what."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from moeserve.cpu_backend import _native as native
from moeserve.cpu_backend import native_runtime
from moeserve.cpu_backend.native_runtime import NativeRuntime

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the idle policy is Linux's")
LONG_US = 60_000_000


def idle_threads() -> set[int]:
    """Of this process, those of the idle policy."""
    tasks = {int(path.name) for path in Path("/proc/self/task").iterdir()}
    return {task for task in tasks if os.sched_getscheduler(task) == os.SCHED_IDLE}


def cpu_ticks(task: int) -> int:
    """Time on a core so far (proc(5), utime and stime), usually in hundredths of a second."""
    fields = Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def has_run(tasks: set[int], begun: dict[int, int]) -> bool:
    return all(cpu_ticks(task) > begun[task] for task in tasks)


def sleeps(task: int) -> bool:
    stat = Path(f"/proc/self/task/{task}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "S"


def comes_true(condition: Callable[[], bool]) -> bool:
    ends_s = time.monotonic() + 60
    while not (found := condition()) and time.monotonic() < ends_s:
        time.sleep(0.01)
    return found


def test_one_thread_for_each_core_and_only_while_it_is_entered() -> None:
    before, cores = idle_threads(), sorted(os.sched_getaffinity(0))[:2]
    waker = native.CoreWaker(cores, LONG_US)
    tasks = idle_threads() - before
    assert sorted(min(os.sched_getaffinity(task)) for task in tasks) == cores
    assert all(len(os.sched_getaffinity(task)) == 1 for task in tasks)
    for _ in range(3):
        begun = {task: cpu_ticks(task) for task in tasks}
        with waker:
            assert comes_true(partial(has_run, tasks, begun))
        ended = {task: cpu_ticks(task) for task in tasks}
        time.sleep(0.1)  # a tenth of a second on a core would be ten ticks
        assert all(cpu_ticks(task) <= ended[task] + 1 for task in tasks)
    del waker
    assert idle_threads() == before


def test_they_sleep_in_a_wait_that_lasts() -> None:
    before = idle_threads()
    waker = native.CoreWaker([min(os.sched_getaffinity(0))], 50_000)
    (task,) = idle_threads() - before
    with waker:
        time.sleep(0.1)  # it is awake by now, or wants to be: other work has its core first
        assert comes_true(lambda: sleeps(task))
        ended = cpu_ticks(task)
        time.sleep(0.2)
        assert cpu_ticks(task) == ended


def test_waits_that_follow_each_other_quickly() -> None:
    """None is lost and none hangs, also when the last thing is to go while one is on."""
    for most_us in (0, 1, LONG_US):
        waker = native.CoreWaker(sorted(os.sched_getaffinity(0)), most_us)
        for _ in range(2000):
            with waker:
                pass
        waker.__enter__()
        ended = threading.Event()

        def go(held: list[native.CoreWaker], done: threading.Event) -> None:
            held.clear()
            done.set()

        held = [waker]
        del waker
        threading.Thread(target=go, args=(held, ended), daemon=True).start()
        assert ended.wait(60)


def test_a_core_that_is_not_ours() -> None:
    before = idle_threads()
    with pytest.raises(ValueError, match=r"cpus: .*core 1048576"):
        native.CoreWaker([min(os.sched_getaffinity(0)), 1 << 20], 1000)
    assert idle_threads() == before


def test_where_cores_are_rationed_they_halt(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, cores = NativeRuntime(1), len(os.sched_getaffinity(0))
    for quota, awake in ((None, True), (cores + 0.5, True), (cores, True), (cores - 0.5, False)):
        monkeypatch.setattr(native_runtime, "cgroup_cores", lambda given=quota: given)
        assert isinstance(runtime.awake(1000), native.CoreWaker if awake else nullcontext)
        assert isinstance(runtime.awake(0), nullcontext)
