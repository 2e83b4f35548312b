"""The choice between pairs of bf16 and float32: what follows from a measurement, and its use."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from moeserve.cpu_backend import _native, isa_speed, native_runtime
from moeserve.cpu_backend.isa_speed import LEAST_GAIN, PAIRS_LEVEL, pair_gain, slow_pairs
from moeserve.cpu_backend.native_runtime import choose_isa

NAMES = [level.name for level in _native.isa_levels()]
USABLE = [level.name for level in _native.isa_levels() if level.usable]


class Level(NamedTuple):
    name: str
    usable: bool
    built: bool = True
    missing: tuple[str, ...] = ("amx_tile",)


def choose(monkeypatch: pytest.MonkeyPatch, gain: float, best: str) -> tuple[str, str]:
    """On a processor that runs all levels up to `best`, with so many pairs for each float32."""
    levels = [Level(name, NAMES.index(name) <= NAMES.index(best)) for name in NAMES]
    monkeypatch.setattr(isa_speed, "pair_gain", lambda name: gain)
    monkeypatch.setattr(native_runtime._native, "isa_levels", lambda: levels)
    monkeypatch.setattr(native_runtime, "wrong_products", lambda name: [])
    return choose_isa("auto")


def test_slow_pairs_are_stepped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    name, reason = choose(monkeypatch, 0.5, best=PAIRS_LEVEL)
    assert name == "avx512_vnni"
    assert reason == "avx512_bf16 makes 50 % as many products of bf16 as of float32"


@pytest.mark.parametrize("gain", [LEAST_GAIN, 1.0, 2.0])
def test_fast_pairs_are_taken(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    assert choose(monkeypatch, gain, best=PAIRS_LEVEL) == (PAIRS_LEVEL, "amx needs amx_tile")


@pytest.mark.parametrize("best", ["amx", "avx512_vnni", "avx2"])
def test_other_levels_do_not_depend_on_pairs(monkeypatch: pytest.MonkeyPatch, best: str) -> None:
    assert choose(monkeypatch, 0.1, best)[0] == best


@pytest.mark.skipif(PAIRS_LEVEL not in USABLE, reason=f"this machine does not run {PAIRS_LEVEL}")
def test_the_measurement_of_this_machine() -> None:
    gain = pair_gain(PAIRS_LEVEL)
    assert gain > 0
    assert pair_gain(PAIRS_LEVEL) == gain  # or two Runtimes of a process could differ
    assert (slow_pairs(PAIRS_LEVEL) is None) == (gain >= LEAST_GAIN)
    # A level that is asked for is taken, slow or not.
    assert choose_isa(PAIRS_LEVEL) == (PAIRS_LEVEL, "asked for")
