"""`--cpu-backend auto`: measured once, remembered by machine, whatever the cache directory is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeserve.config import ExpertConfig
from moeserve.core import ExpertSpec
from moeserve.cpu_backend.backend import Demands
from moeserve.cpu_backend.choice import choose_backend
from moeserve.cpu_backend.ipex_backend import IpexBackend, why_not_usable
from moeserve.cpu_backend.measurement import MeasurementFailed, measure_in_own_process, score_ms
from moeserve.cpu_backend.remembered import Machine, Measured, recall, remember
from moeserve.environment import read_environment

CONFIG = ExpertConfig(num_threads=1)
#: ipex computes no gelu, so that torch and native remain, wherever this runs
GELU = ExpertSpec(num_experts=4, hidden_size=32, intermediate_size=32, activation="gelu")
BF16 = Demands(torch.bfloat16, (GELU,))
MACHINE = Machine(
    cpu="x", isa="avx2", num_threads=2, dtype="float32", moeserve="1", torch="2", ipex=None
)
MEASURED = Measured(machine=MACHINE, date="2026-01-02", layer_ms={"native": [1.0, 2.0]})


def measured(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(path.read_text())["measured"]
    return entries


def test_measured_once_and_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "new" / "times.json"
    first = choose_backend(CONFIG, BF16, path)
    assert caplog.text.count("measuring native, torch") == 1
    (entry,) = measured(path)
    scores = {name: score_ms(times_ms) for name, times_ms in entry["layer_ms"].items()}
    fast, slow = sorted(scores, key=lambda name: scores[name])
    ratio = scores[slow] / scores[fast]
    assert first.backend.name == fast
    assert (
        f"{fast} (measured {ratio:.1f}x {slow} on this machine on {entry['date']}" in first.reason
    )
    again = choose_backend(CONFIG, BF16, path)
    assert again.reason == first.reason
    assert caplog.text.count("measuring") == 1
    assert [p.name for p in path.parent.iterdir()] == ["times.json"]


def test_what_is_remembered_decides(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    choose_backend(CONFIG, BF16, path)
    content = json.loads(path.read_text())
    content["measured"][0]["layer_ms"] = {"native": [30.0, 30.0], "torch": [2.0, 50.0]}
    content["measured"][0]["date"] = "2026-11-21"
    path.write_text(json.dumps(content))
    chosen = choose_backend(CONFIG, BF16, path)
    assert chosen.reason.startswith("torch (measured 3.0x native on this machine on 2026-11-21")


@pytest.mark.parametrize(
    ("config", "demands"),
    [
        (ExpertConfig(num_threads=2), BF16),
        (ExpertConfig(num_threads=1, isa="scalar"), BF16),
        (CONFIG, Demands(torch.float32, (GELU,))),
    ],
    ids=["threads", "isa", "dtype"],
)
def test_another_situation_is_measured_by_itself(
    config: ExpertConfig, demands: Demands, tmp_path: Path
) -> None:
    path = tmp_path / "times.json"
    choose_backend(CONFIG, BF16, path)
    choose_backend(config, demands, path)
    machines = [json.dumps(entry["machine"]) for entry in measured(path)]
    assert len(set(machines)) == 2


def test_the_file_is_in_the_users_cache_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_environment().cache_home == tmp_path / "moeserve"
    choose_backend(CONFIG, BF16)
    assert len(measured(tmp_path / "moeserve" / "cpu-backend.json")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_environment().cache_home == tmp_path / ".cache" / "moeserve"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b'{"format": 1}',
        b'{"format": 2, "measured": []}',
        b'{"format": 1, "measured": [{"machine": {}}]}',
        b'{"format": 1, "measured": [], "more": 1}',
    ],
)
def test_a_foreign_file_is_replaced_with_a_log_line(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "times.json"
    path.write_bytes(content)
    assert recall(path, MACHINE) is None
    assert "measuring again" in caplog.text
    remember(path, MEASURED)
    assert recall(path, MACHINE) == MEASURED


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_damaged_file_never_raises(at: int, byte: int, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.unlink(missing_ok=True)
    remember(path, MEASURED)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = byte
    path.write_bytes(content)
    found = recall(path, MACHINE)
    assert found is None or found.machine == MACHINE


def test_a_directory_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file stands where the directory should be: refused to root, too, unlike a mode of 0500."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    chosen = choose_backend(CONFIG, BF16, blocked / "times.json")
    assert chosen.backend.name in ("native", "torch")
    assert "measured times are not kept" in caplog.text


def test_one_entry_for_each_machine_and_not_too_many(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    for threads in [*range(1, 80), 3]:
        machine = Machine(**{**_fields(MACHINE), "num_threads": threads})
        remember(path, Measured(machine=machine, date="d", layer_ms={}))
    threads = [entry["machine"]["num_threads"] for entry in measured(path)]
    assert threads[:3] == [3, 79, 78]
    assert len(threads) == len(set(threads)) == 64


def _fields(machine: Machine) -> dict[str, Any]:
    return {name: getattr(machine, name) for name in machine.__struct_fields__}


def test_nothing_is_measured_where_one_backend_can_run_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "times.json"
    half = choose_backend(CONFIG, Demands(torch.float16, (GELU,)), path)
    assert half.reason.startswith("torch (auto: the only one for this model; native is out: ")
    assert "no float16 ones" in half.reason
    quantized = choose_backend(CONFIG, Demands(torch.float16, (GELU,), quantized=True), path)
    assert quantized.reason.startswith("native (auto: the only one for this model; torch is out: ")
    assert not path.exists()
    assert "measuring" not in caplog.text


@pytest.mark.skipif(why_not_usable() is None, reason="ipex is here")
def test_a_backend_that_cannot_be_measured_says_why() -> None:
    with pytest.raises(MeasurementFailed, match=r"ipex: .*pip install 'moeserve\[ipex\]'"):
        measure_in_own_process("ipex", torch.bfloat16, 1)


def test_one_that_fails_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of its own really runs and fails: there is no ipex here, or no such dtype."""
    monkeypatch.setattr(IpexBackend, "lacks", lambda demands: None)
    chosen = choose_backend(CONFIG, Demands(torch.float16, (GELU,)), tmp_path / "times.json")
    if why_not_usable() is not None:
        assert chosen.backend.name == "torch"
        assert "; not measured: ipex: " in chosen.reason
        assert measured(tmp_path / "times.json")[0]["failed"]["ipex"]
