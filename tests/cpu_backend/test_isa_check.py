"""The check of ISA levels before their use: right ones pass, a wrong one is seen and not used."""

from __future__ import annotations

import pytest

from moeserve.core import ConfigError
from moeserve.cpu_backend import _native, native_runtime
from moeserve.cpu_backend.isa_check import FORMATS, ROWS, SHAPES, wrong_products
from moeserve.cpu_backend.native_runtime import choose_isa

USABLE = [level.name for level in _native.isa_levels() if level.usable]


@pytest.mark.parametrize("name", [*USABLE, "scalar_bf16"])
def test_the_levels_of_this_machine_pass(name: str) -> None:
    assert wrong_products(name) == []


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # The same products with every weight halved stand for kernels that compute wrongly.
    run = _native.PackedMatrix.run

    class Halved(_native.Runtime):  # type: ignore[misc]
        pass

    def wrong(matrix: object, runtime: object, x: object, out: object) -> None:
        run(matrix, runtime, x, out)
        if isinstance(runtime, Halved):
            out *= 0.5  # type: ignore[operator]

    class Matrix:
        def __init__(self, *arguments: object) -> None:
            self._real = _native.PackedMatrix(*arguments)

        def run(self, runtime: object, x: object, out: object) -> None:
            wrong(self._real, runtime, x, out)

    def make(name: str, threads: int) -> _native.Runtime:
        return (_native.Runtime if name == "scalar" else Halved)(name, threads)

    class Module:
        allocate = _native.allocate
        pack, pack_codes = _native.pack, _native.pack_codes
        PackedMatrix, Runtime = Matrix, staticmethod(make)

    monkeypatch.setattr("moeserve.cpu_backend.isa_check._native", Module)
    assert len(wrong_products(USABLE[-1])) == len(SHAPES) * len(FORMATS) * len(ROWS)


@pytest.mark.skipif(len(USABLE) < 2, reason="this machine runs the scalar level only")
def test_a_wrong_level_is_stepped_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    best = USABLE[-1]
    monkeypatch.setattr(
        native_runtime, "wrong_products", lambda name: ["format 1"] if name == best else []
    )
    monkeypatch.setattr(native_runtime, "slow_pairs", lambda name: None)
    name, reason = choose_isa("auto")
    assert name == USABLE[-2]
    assert best in reason
    assert "computes wrongly" in caplog.text
    with pytest.raises(ConfigError, match="computes wrongly"):
        choose_isa(best)
