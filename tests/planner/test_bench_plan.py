"""What the planner's benchmark keeps, and what it says of its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_plan
import pytest
from bench_plan import engine_digest, to_record, trace_of
from msgspec.structs import replace
from plan_bench.calibrations import Calibrations, form_of
from plan_bench.measure import middle_of
from plan_bench.predict import mean_of
from plan_bench.report import markdown, summarise
from support.engine_profile import made_profile

from moeserve.experts.schedule.profile import Profile
from moeserve.experts.schedule.profile_file import encode_profile, read_profile
from moeserve.planner.simulate.system import CONFIDENCE

DECIDE = (
    "moeserve/core.py",
    "moeserve/config/experts.py",
    "moeserve/timeline.py",
    "moeserve/planner/random_model.py",
    "moeserve/planner/simulate/system.py",
    "moeserve/engine/engine.py",
    "cpu_backend/csrc/attention.cpp",
    "scripts/plan_bench/measure.py",
)


def test_what_decides_a_measurement_is_in_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*bench_plan.ENGINE_FILES, *DECIDE, "moeserve/gateway/server.py"):
        assert (bench_plan.ROOT / name).is_file(), name
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(bench_plan, "ROOT", tmp_path)
    seen = {engine_digest()}
    for name in DECIDE:
        (tmp_path / name).write_text("after")
        assert engine_digest() not in seen, name
        seen.add(engine_digest())
    (tmp_path / "moeserve/gateway/server.py").write_text("after")
    assert engine_digest() in seen


def test_routing_is_recorded_anew_with_another_engine_and_on_demand(tmp_path: Path) -> None:
    def traces(engine: str) -> dict[int, Path]:
        return {n: trace_of(tmp_path, "few-large-int8", n, engine) for n in (64, 256)}

    one, other = traces(64 * "a"), traces(64 * "b")
    assert len({*one.values(), *other.values()}) == 4
    one[64].touch()
    assert to_record(one, again=False) == {256: one[256]}
    assert to_record(one, again=True) == one
    assert to_record(other, again=False) == other


def test_what_is_said_of_ranges_is_true_of_the_newest_measurement() -> None:
    newest = max((bench_plan.ROOT / "benchmarks" / "results").glob("*-plan.json"))
    summary = json.loads(newest.read_text())["summary"]
    assert summary["inside_the_range_with_calibrated_disk"] >= CONFIDENCE, newest.name


def row(name: str, factor: float) -> dict[str, Any]:
    """Right from the disk as it was, off by a factor from the disk as it was calibrated."""
    measured = {"tokens_per_s": 20.0, "ttft_s": 0.5, "tpot_s": 0.05, "rss_bytes": 1e9}
    measured |= {"slowest": 19.0, "fastest": 21.0, "hit_rate": 0.5}
    predicted = {**measured, "low": 18.0, "high": 22.0}
    calibrated = {part: factor * predicted[part] for part in ("tokens_per_s", "low", "high")}
    calibrated |= {part: predicted[part] / factor for part in ("ttft_s", "tpot_s")}
    case = {"name": name, "shape": "shared", "quantize": "int8", "num_streams": 4}
    case |= {"context_tokens": 64, "share": 50}
    return {
        **case, "measured": measured, "predicted": predicted, "with_calibrated_disk": calibrated
    }  # fmt: skip


def test_the_plan_that_a_user_gets_has_figures_of_its_own() -> None:
    rows = [row("same", 1.0), row("slower", 0.8)]
    summary = summarise(rows)
    for part, mean in (("tokens_per_s", 0.9), ("ttft_s", 0.875), ("tpot_s", 0.875)):
        assert summary[part]["mean_accuracy"] == 1
        assert summary[f"{part}_with_calibrated_disk"]["mean_accuracy"] == pytest.approx(mean)
        assert summary[f"{part}_with_calibrated_disk"]["worst"] == "slower"
    assert summary["inside_the_range"] == 1
    assert summary["inside_the_range_with_calibrated_disk"] == 0.5
    machine = {"cpu": "made up", "cores": 2}
    record = {"date": "2026-11-21", "command": "x", "machine": machine, "profile_date": "then"}
    lines = markdown({**record, "output_tokens": 24, "summary": summary, "rows": rows}).splitlines()
    table = [line for line in lines if line.startswith(("| model", "| shared", "| --- "))]
    assert len({line.count("|") for line in table[1:]}) == 1
    head = [cell.strip() for cell in table[1].split("|")]
    place = head.index("with the calibrated disk")
    assert [line.split("|")[place].strip() for line in table[-2:]] == ["100.0%", "80.0%"]


def test_a_model_s_first_profile_may_be_the_last_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def calibrate(model: str, path: Path) -> Profile:
        made.append(path.name.removesuffix(".profile.json"))
        forms = [form_of(model), "float32"]
        curves = [replace(shipped.cpu.expert_curves[0], weights=form) for form in forms]
        path.write_bytes(encode_profile(replace(shipped, cpu=replace(cpu, expert_curves=curves))))
        return read_profile(path)

    shipped = made_profile(tmp_path)
    cpu = shipped.cpu
    monkeypatch.setattr(Calibrations, "_calibrate", staticmethod(calibrate))

    def find(path: str, foreign: bool) -> Profile:
        return read_profile(Path(path))

    monkeypatch.setattr("plan_bench.calibrations.find_hardware", find)

    def run(
        models: list[str], again: bool = False, is_measured: bool = False, rounds: int = 3
    ) -> list[str]:
        made.clear()
        calibrations = Calibrations(tmp_path, again, rounds)
        for model in models:
            calibrations.first(model, lambda profile: is_measured)
            for number in range(1, rounds + 1):
                if calibrations.is_due(number):
                    calibrations.after(model, number)
        return list(made)

    both = ["few-int8", "many-int8", "many-int4"]
    wanted = ["few-int8-0", "few-int8-2", "few-int8-3", "many-int8-2", "many-int8-3"]
    wanted += ["many-int4-0", "many-int4-2", "many-int4-3"]
    assert run(both) == wanted
    assert run(both, is_measured=True) == []
    assert run(both, again=True, is_measured=True) == wanted
    (tmp_path / "many-int8-2.profile.json").unlink()
    assert run(both, is_measured=True) == ["many-int8-0", "many-int8-2", "many-int8-3"]
    for rounds, numbers in ((1, [0, 1]), (2, [0, 2]), (4, [0, 2, 4])):
        alone = run(["few-int8"], again=True, rounds=rounds)
        assert alone == [f"few-int8-{number}" for number in numbers]


def test_rounds_and_profiles_are_put_together() -> None:
    point = {"block": 1.0, "depth": 1.0, "bytes_per_s": 2.0}
    rounds = [
        {
            "tokens_per_s": speed,
            "times": 2,
            "fastest": speed + 1,
            "slowest": speed - 1,
            "disk": [point],
        }
        for speed in (10.0, 40.0, 20.0)
    ]
    found = middle_of(rounds)
    assert (found["tokens_per_s"], found["times"]) == (20.0, 6)
    assert (found["fastest"], found["slowest"], found["disk"]) == (41.0, 9.0, 3 * [point])
    limits = {"decode": "memory"}
    both = mean_of([{"ttft_s": 1.0, "limits": limits}, {"ttft_s": 2.0, "limits": {}}])
    assert both == {"ttft_s": 1.5, "limits": limits}
