"""What `moeserve plan` refuses, by name and with 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from support.engine_profile import made_profile
from support.known_configs import MIXTRAL_8X7B, SMALL_DENSE
from support.plan_command import SHEET, plan, refusal, write_profile_of_here

from moeserve.cli import main
from moeserve.experts.schedule.profile_file import encode_profile, read_profile


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    write_profile_of_here(path)
    return path


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
        (["--slots", "0"], "slots: 0 is below the minimum 1"),
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
        (["--workload", "w.csv", "--concurrency", "3"], "concurrency: contradicts --workload"),
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


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere.json", "no such file or directory"),
        ("/nowhere/at/all", "no such file or directory"),
        ("folder", "weights.gguf: GGUF files are not read"),
        ("folder/weights.gguf", "weights.gguf: GGUF files are not read"),
    ],
)
def test_what_is_no_model_is_named(
    model: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, model, "--hardware", SHEET)


def test_traffic_is_no_matter_of_the_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,374,44\n")
    flags = ("--hardware", SHEET, "--bound-only", "--workload", str(path))
    assert "bound_only: contradicts --workload" in refusal(capsys, *flags)


@pytest.mark.parametrize("form", [["--json"], []])
def test_output_that_cannot_be_written_is_named(form: list[str], here: Path) -> None:
    if not (full := Path("/dev/full")).exists():
        pytest.skip(f"no {full}")
    flags = ["plan", "--hardware", str(here), "--bound-only", "--no-advice", *form]
    with full.open("w") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "moeserve.cli", *flags],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("moeserve:")]
    assert "stdout: cannot be written: No space left on device" in said
    assert "Traceback" not in done.stderr


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


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("read", "bytes_per_s", {"value": 0.0}, "bytes_per_s 0.0 must be above 0"),
        ("disk", "bytes_per_s", {"value": 0.0}, "bytes_per_s 0.0 must be above 0"),
        ("ops_per_s", "bf16", {"value": 0.0}, "ops_per_s of bf16 0.0 must be above 0"),
        ("cpu", "memory_bytes", 0, "allowed: 1 or more"),
    ],
)
def test_a_profile_of_a_machine_that_can_do_nothing_is_refused(
    part: str,
    field: str,
    value: object,
    message: str,
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    profile = json.loads(here.read_bytes())
    cpu = profile["cpu"]
    parts = {
        "cpu": cpu,
        "read": cpu["read"][0],
        "ops_per_s": cpu["ops_per_s"],
        "disk": profile["disk"][0],
    }
    parts[part][field] = value
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    said = refusal(capsys, "--hardware", str(path), "--host-slots", "9")
    assert message in said
    assert str(path) in said


def test_without_a_profile_of_this_machine_it_is_said_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = refusal(capsys)
    assert "was not calibrated" in said
    assert "moeserve calibrate" in said


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


def test_a_dense_model_has_no_slots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL_DENSE))
    flags = (str(path), "--hardware", SHEET, "--output-tokens", "8")
    found = plan(capsys, *flags)
    assert all(estimate["hit_rate"] is None for estimate in found["estimates"])
    for tier in ("host", "device"):
        assert "has no experts" in refusal(capsys, *flags, f"--{tier}-slots", "4")


def test_a_tier_over_a_disk_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where so little is computed that the bound reads nothing."""
    flags = ("--hardware", "a40-xeon8380", "--host-slots", "95", "--no-advice")
    said = refusal(capsys, *flags, "--prompt-tokens", "1", "--output-tokens", "1")
    assert "the profile has no disk" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda", "--quantize", "int4"], "quantize: int4 needs the native CPU backend"),
        (["--device", "cuda", "--host-slots", "9"], "all experts stand on the device, unless"),
        (["--device", "cpu", "--dtype", "float16", "--host-slots", "9"], "are packed for the"),
        (["--device", "emulated", "--dtype", "float16"], "keeps no float16 weights"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_as_serving_does(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, "--hardware", SHEET, "--bound-only", *flags)


@pytest.mark.parametrize("command", [("plan", "--hardware", SHEET), ("serve",)])
def test_no_model_is_not_the_bundled_one(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A variable of a script that is not set."""
    assert main([*command, ""]) == 2
    assert "model: the name is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("steps", [], "must have points"),
        ("attention", [], "must have points"),
        ("sampling", [], "must have points"),
        ("config", {}, "the model that its steps were measured on is none"),
    ],
)
def test_a_profile_whose_steps_say_nothing_is_refused(
    part: str, value: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = json.loads(encode_profile(made_profile(tmp_path)))
    profile["steps"][part] = value
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    arguments = ("--hardware", str(path), "--foreign", "--kv-bytes", "1MiB", "--no-advice")
    said = refusal(capsys, *arguments, "--prompt-tokens", "9", "--output-tokens", "2")
    assert message in said


def test_more_requests_than_can_be_counted_only_wait(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, many = (
        plan(
            capsys, "--hardware", str(here), "--slots", "24", "--prompt-tokens", "9",
            "--output-tokens", "2", "--no-advice", "--max-running", "2", "--concurrency", count,
        )["estimates"][1]
        for count in ("40", str(10**20))
    )  # fmt: skip
    assert many["output_tokens_per_s"] == few["output_tokens_per_s"]
    assert many["ttft_s"]["mid"] > few["ttft_s"]["mid"]
