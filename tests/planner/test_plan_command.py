"""`moeserve plan` as a user calls it: what it prints, and what it refuses, by name and with 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from support.known_configs import MIXTRAL_8X7B

from moeserve import __version__
from moeserve.cli import main
from moeserve.config import BUNDLED_MODEL
from moeserve.experts.schedule.profile import (
    DiskPoint,
    Figure,
    encode_profile,
    read_profile,
    shipped_profile,
)
from moeserve.planner.hardware import this_hardware

SHEET = "rtx4090-pcie4"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("mixtral") / "config.json"
    file.write_text(json.dumps(MIXTRAL_8X7B))
    return str(file)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile that says it was measured here: rates of a data sheet, without a device."""
    sheet = shipped_profile(SHEET)
    disk = DiskPoint(block_bytes=1 << 20, queue_depth=4, bytes_per_s=Figure(value=2e9))
    profile = structs.replace(
        sheet,
        source="measured",
        hardware=this_hardware(),
        moeserve=__version__,
        device=None,
        link=[],
        disk=[disk],
    )
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    path.write_bytes(encode_profile(profile))
    return path


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON of a plan that fits."""
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said about a plan that cannot be made."""
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err


def bound_of(found: dict[str, Any]) -> dict[str, Any]:
    bound: dict[str, Any] = found["estimates"][0]
    assert bound["stage"] == "bound"
    return bound


def test_a_config_alone_is_planned_for_a_machine_that_is_not_at_hand(
    mixtral: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (mixtral, "--hardware", SHEET, "--bound-only")
    found = plan(capsys, *flags, "--quantize", "int4")
    assert found["memory"]["fits"]
    tiers = found["memory"]["tiers"]
    assert tiers["device"]["peak_bytes"] <= tiers["device"]["limit_bytes"] == 24 << 30
    parts = {part["name"]: part["num_bytes"] for part in found["memory"]["parts"]}
    record = parts["experts, pinned"] // 256
    assert parts["expert slots on the device"] == found["settings"]["device_slots"] * record
    bound = bound_of(found)
    assert {limit["phase"] for limit in bound["limits"]} == {"prefill", "decode"}
    assert found["settings"]["device_slots"] / 256 < bound["hit_rate"] <= 1
    factors = [advice["factor"] for advice in found["advice"] if advice["fits"]]
    assert factors == sorted(factors, reverse=True)
    words = {advice["change"]: advice["factor"] for advice in found["advice"]}
    assert words["twice the RAM"] == 1.0
    assert words["a device twice as fast"] > 1.3


def test_the_table_names_memory_speed_limits_and_advice(
    mixtral: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["plan", mixtral, "--hardware", SHEET, "--quantize", "int4", "--bound-only"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    for wanted in (
        "46.70 billion parameters",
        "weights of every token",
        "kv of the requests",
        "time to first token",
        "prefill waits for the",
        "decode waits for the",
        "what would help",
        "no effect",
        "data sheets, not measured",
    ):
        assert wanted in said


def test_more_never_makes_the_bound_worse(mixtral: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (mixtral, "--hardware", SHEET, "--bound-only", "--no-advice", "--quantize", "int4")
    rates = [
        bound_of(plan(capsys, *flags, "--slots", str(slots)))["output_tokens_per_s"]["mid"]
        for slots in (8, 32, 64, 128, 200, 230)
    ]
    assert rates == sorted(rates)
    assert rates[-1] > 2 * rates[0]


def test_fewer_bits_are_smaller_and_faster(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        plan(capsys, "--hardware", str(here), "--bound-only", "--no-advice", "--quantize", bits)
        for bits in ("none", "int8", "int4")
    ]
    sizes = [each["model"]["weights_bytes"] for each in found]
    assert sizes == sorted(sizes, reverse=True)
    times = [bound_of(each)["tpot_s"]["mid"] for each in found]
    assert times == sorted(times, reverse=True)


def test_what_does_not_fit_is_refused_with_numbers_and_the_nearest_that_does(
    mixtral: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (mixtral, "--hardware", SHEET, "--device", "cpu", "--bound-only")
    assert main(["plan", *flags, "--json"]) == 2
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert not said["memory"]["fits"]
    host = said["memory"]["tiers"]["host"]
    assert host["peak_bytes"] > host["limit_bytes"] == 64 << 30
    assert "does not fit" in printed.err
    assert "64.00 GiB there" in printed.err
    assert said["nearest"] in printed.err
    assert plan(capsys, *flags, "--no-advice", *said["nearest"].split())["memory"]["fits"]
    # As a table the numbers go to standard error: standard output is for plans.
    assert main(["plan", *flags]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert "at most" in printed.err


def test_experts_on_disk_share_the_budget(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = 16 << 20
    found = plan(
        capsys, "--hardware", str(here), "--bound-only", "--host-memory", str(budget),
        "--prompt-tokens", "64", "--output-tokens", "32", "--no-advice", "--kv-bytes", "1MiB",
    )  # fmt: skip
    parts = {part["name"]: part for part in found["memory"]["parts"]}
    within = ("weights of every token", "expert slots", "kv of the requests")
    held = sum(parts[name]["num_bytes"] for name in within)
    record = parts["expert slots"]["num_bytes"] // found["settings"]["host_slots"]
    assert budget - record < held <= budget
    assert parts["experts"]["tier"] == "disk"
    assert 0 < bound_of(found)["hit_rate"] <= 1


def test_a_picture_of_both_stages(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.png"
    plan(capsys, "--hardware", str(here), "--bound-only", "--no-advice", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [each.name for each in tmp_path.iterdir()] == ["plan.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--concurrency", "0"], "concurrency: 0 is below the minimum 1"),
        (["--output-tokens", "0"], "output_tokens: 0 is below"),
        (["--prompt-tokens", "-3"], "prompt_tokens: -3 is below"),
        (["--context", "99999"], "context_tokens: 99999 is above"),
        (["--prompt-tokens", "1000", "--output-tokens", "100"], "exceed the context of"),
        (["--kv-bytes", "1"], "below one block"),
        (["--kv-bytes", "1MiB", "--prompt-tokens", "800"], "needs 58 kv blocks"),
        (["--kv-bytes", "1MiB", "--num-blocks", "3"], "contradict each other"),
        (["--slots", "4", "--host-slots", "5"], "contradicts host_slots"),
        (["--slots", "4", "--host-memory", "1GiB"], "contradicts host_memory_bytes"),
        (["--host-slots", "4000"], "is more than the model's 96"),
        (["--host-memory", "1MiB", "--kv-bytes", "8MiB"], "at least"),
        (["--device", "emulated"], "has no device in its profile"),
        (["--quantize", "int3"], "'int3' is not one of"),
        (["--trace", "routing.npz"], "routing.npz: trace: cannot be read"),
        (["--requests", "3"], "requests: it is for --workload"),
        (["--slo-ttft", "1"], "slo_ttft: it is for --workload"),
        (["--workload", "w.csv", "--output-tokens", "3"], "output_tokens: contradicts --workload"),
        (["--host-slots", "9", "--predictor", "gate_lookahead"], "a plan has no hidden states"),
        (["--local-workers", "2"], "local_workers: a plan knows no expert workers"),
        (["--worker", "ipc:///tmp/w"], "workers: a plan knows no expert workers"),
        (["--plot", "/nowhere/at/all.png"], "is no directory"),
        (["--plot", "plan.exe"], "no kind of picture"),
    ],
)
def test_what_contradicts_itself_is_named(
    flags: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--hardware", str(here), "--bound-only", *flags]
    if "--device" in flags:
        arguments += ["--device-slots", "4"]
    assert message in refusal(capsys, *arguments)


def test_no_workers_are_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--hardware", str(here), "--bound-only", "--local-workers"]
    assert main([*arguments, "0"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*arguments, "x"])
    assert "--local-workers: invalid int value: 'x'" in capsys.readouterr().err


def test_models_that_cannot_be_served_are_named(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware = ("--hardware", str(here))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MIXTRAL_8X7B | {"model_type": "mamba"}))
    assert "'mamba' is not one of" in refusal(capsys, str(file), *hardware)
    file.write_text("{")
    assert "not JSON" in refusal(capsys, str(file), *hardware)
    assert "no such file or directory" in refusal(
        capsys, str(tmp_path / "none"), "--offline", *hardware
    )


def test_profiles_of_other_machines_and_versions_are_refused(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = read_profile(here)
    path = tmp_path / "profile.json"

    def refused(changed: object) -> str:
        path.write_bytes(encode_profile(changed))  # type: ignore[arg-type]
        return refusal(capsys, "--hardware", str(path), "--bound-only")

    other = structs.replace(profile.hardware, cpu="Another CPU", num_cores=64)
    said = refused(structs.replace(profile, hardware=other))
    assert "of another machine" in said
    assert "'Another CPU'" in said
    assert "num_cores 64" in said
    # Unless it is said that the other machine is meant.
    arguments = ["plan", "--hardware", str(path), "--foreign", "--bound-only", "--no-advice"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert "is stale" in refused(structs.replace(profile, moeserve="0.0.1"))
    assert "has version 1" in refused(structs.replace(profile, version=1))
    path.write_text("{}")
    assert "is no profile" in refusal(capsys, "--hardware", str(path))
    said = refusal(capsys, "--hardware", "rtx9")
    assert "'rtx9' is no file" in said
    assert SHEET in said


def test_without_a_profile_of_this_machine_it_is_said_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = refusal(capsys)
    assert "was not calibrated" in said
    assert "moeserve calibrate" in said


def test_planning_leaves_the_model_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {each: each.stat().st_mtime_ns for each in BUNDLED_MODEL.iterdir()}
    plan(capsys, "--hardware", str(here), "--bound-only", "--no-advice")
    assert before == {each: each.stat().st_mtime_ns for each in BUNDLED_MODEL.iterdir()}


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "top_k"), [(6, 16, 2), (5, 16, 4), (6, 64, 4)]
)
def test_a_trace_of_another_model_is_refused(
    num_layers: int,
    num_experts: int,
    top_k: int,
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The bundled model has 6 layers of 16 experts, 4 of which a token takes."""
    rng = np.random.default_rng(0)
    order = rng.permuted(np.tile(np.arange(num_experts), (40, num_layers, 1)), axis=2)
    ids = order[..., :top_k]
    ids[0, 0] = num_experts - 1 - np.arange(top_k)
    probs = np.full(ids.shape, 1 / top_k, np.float32)
    lens = np.array([40])
    np.savez(tmp_path / "routing.npz", ids=ids, probs=probs, lens=lens)
    arguments = ("--hardware", str(here), "--slots", "24", "--trace")
    said = refusal(capsys, *arguments, str(tmp_path / "routing.npz"))
    assert f"has {num_layers} MoE layers of {num_experts} experts, {top_k} per token" in said
    assert "cannot be read" in refusal(capsys, *arguments, str(tmp_path / "none.npz"))
