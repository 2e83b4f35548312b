"""The choice of a backend: what is asked for, what is refused, what it says about itself."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from moeserve.core import ConfigError
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.backend import choose_backend
from moeserve.cpu_backend.threads import affinity_cores

#: levels from the plainest to the fastest: those that run here, and what each other one lacks
USABLE = [level.name for level in _native.isa_levels() if level.usable]
LACKING = {
    level.name: ", ".join(level.missing) if level.built else "a build that has it"
    for level in _native.isa_levels()
    if not level.usable
}


def test_torch_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    choice = choose_backend("torch")
    assert (choice.backend.name, choice.native) == ("torch", None)
    assert choice.reason == "torch (asked for)"
    assert choice.reason in caplog.text
    choice.backend.close()


def test_native_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    choice = choose_backend("native", num_threads=1)
    assert choice.backend.name == "native"
    assert choice.native is not None
    assert choice.reason == f"native (asked for); {choice.native.reason}"
    assert f"{choice.native.isa} (" in choice.reason
    assert "1 threads" in choice.reason
    assert "native (asked for)" in caplog.text
    choice.backend.close()


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cpu_backend: 'openvino' is not one of auto, native"):
        choose_backend("openvino")


@pytest.mark.parametrize("isa", USABLE)
def test_any_usable_level_may_be_asked_for(isa: str) -> None:
    choice = choose_backend("native", num_threads=1, isa=isa)
    assert choice.native is not None
    assert choice.native.isa == choice.native.handle.isa == isa
    assert f"{isa} (asked for)" in choice.reason


def test_auto_takes_the_fastest_level_and_names_what_the_next_one_lacks() -> None:
    choice = choose_backend("native", num_threads=1)
    assert choice.native is not None
    assert choice.native.isa == USABLE[-1]
    for name, lacks in list(LACKING.items())[:1]:
        assert "a build" in lacks or f"{name} needs {lacks}" in choice.reason


@pytest.mark.parametrize("isa", LACKING)
def test_a_level_that_cannot_run_is_refused_with_what_is_lacking(isa: str) -> None:
    with pytest.raises(ConfigError, match=f"isa: '{isa}' cannot run") as caught:
        choose_backend("native", num_threads=1, isa=isa)
    assert LACKING[isa] in str(caught.value)
    assert caught.value.field == "isa"
    assert ", ".join(USABLE) in str(caught.value)


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"isa: 'sse9' is not one of auto, scalar"):
        choose_backend("native", isa="sse9")


@pytest.mark.parametrize("num_threads", [0, -1])
def test_no_threads_are_refused(num_threads: int) -> None:
    with pytest.raises(ConfigError, match=f"num_threads: {num_threads} is below the minimum 1"):
        choose_backend("native", num_threads)


def test_more_threads_than_cores_run_and_are_named() -> None:
    wanted = affinity_cores() + 3
    choice = choose_backend("native", wanted)
    assert choice.native is not None
    assert choice.native.num_threads == choice.native.handle.num_threads == wanted
    assert "more than the" in choice.reason


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this platform")
def test_pinned_threads_stay_on_the_first_cores() -> None:
    """Affinity belongs to the thread, so one that ends with the test is pinned."""
    allowed = sorted(os.sched_getaffinity(0))

    def pinned() -> tuple[set[int], str]:
        choice = choose_backend("native", num_threads=1, pin=True)
        return os.sched_getaffinity(0), choice.reason

    with ThreadPoolExecutor(1) as pool:
        cores, reason = pool.submit(pinned).result()
    assert cores == {allowed[0]}
    assert f"on cores {allowed[0]}" in reason
    assert sorted(os.sched_getaffinity(0)) == allowed


def test_more_threads_than_cores_are_not_pinned() -> None:
    def unpinned() -> tuple[int, str]:
        choice = choose_backend("native", num_threads=affinity_cores() + 1, pin=True)
        return affinity_cores(), choice.reason

    with ThreadPoolExecutor(1) as pool:
        cores, reason = pool.submit(unpinned).result()
    assert cores == affinity_cores()
    assert "on cores" not in reason
