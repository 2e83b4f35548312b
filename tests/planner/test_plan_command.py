"""`moeserve plan` as a user calls it: what it prints."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from support.known_configs import MIXTRAL_8X7B, SMALL_DENSE
from support.plan_command import SHEET, plan, refusal, write_profile_of_here

from moeserve.cli import main
from moeserve.config import BUNDLED_MODEL
from moeserve.cpu_backend import cgroup
from moeserve.experts.schedule.profile_file import shipped_profile
from moeserve.planner import plan_plot
from moeserve.planner.lookup import within_group


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("mixtral") / "config.json"
    file.write_text(json.dumps(MIXTRAL_8X7B))
    return str(file)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    write_profile_of_here(path)
    return path


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


@pytest.mark.parametrize("device", [("--device", "cpu"), ()])
def test_of_one_output_token_nothing_is_said_about_further_ones(
    device: tuple[str, ...], mixtral: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (mixtral, "--hardware", SHEET, "--quantize", "int4", *device)
    flags = (*flags, "--prompt-tokens", "64", "--output-tokens", "1", "--no-advice")
    for estimate in plan(capsys, *flags)["estimates"]:
        assert estimate["tpot_s"] is None, estimate["stage"]
        assert {limit["phase"] for limit in estimate["limits"]} == {"prefill"}
    assert main(["plan", *flags]) == 0
    table = capsys.readouterr().out
    (line,) = (line for line in table.splitlines() if line.startswith("time per output token"))
    assert line.split("ms")[1].split() == ["n/a", "n/a"]
    assert "decode" not in table
    assert plan(capsys, *flags, "--output-tokens", "2")["estimates"][0]["tpot_s"] is not None


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


def test_the_pictured_ranges_end_at_the_bound(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bands that are drawn, of a machine whose guessed range goes beyond."""
    drawn: list[Any] = []
    line = plan_plot._line
    monkeypatch.setattr(plan_plot, "_line", lambda *args: drawn.append(line(*args)) or drawn[-1])
    flags = ("--hardware", str(here), "--prompt-tokens", "1000", "--output-tokens", "1")
    assert main(["plan", *flags, "--no-advice", "--plot", str(tmp_path / "plan.png")]) == 0
    assert [each.stage for each in drawn] == ["bound", "system"] * 2
    for bound, system in (drawn[:2], drawn[2:]):
        for most, mid, high in zip(bound.mid, system.mid, system.high, strict=True):
            assert high <= max(most, mid) * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_that_cannot_be_written_leaves_nothing(
    kind: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as on a disk that is full
    try:
        flags = ("--hardware", str(here), "--bound-only", "--no-advice", "--plot")
        assert "plot: " in refusal(capsys, *flags, str(tmp_path / f"plan.{kind}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gap_s", "max_running", "planned"), [(0, 64, 3), (0, 2, 2), (3600, 64, 1)]
)
def test_arrivals_decide_how_many_run_at_once(
    gap_s: int,
    max_running: int,
    planned: int,
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1000 * gap_s * rank, "input_length": 40 + 2 * rank, "output_length": 6}
        for rank in range(3)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = plan(
        capsys, "--hardware", str(here), "--workload", str(path), "--no-advice",
        "--max-running", str(max_running),
    )  # fmt: skip
    assert found["workload"]["most_at_once"] == (1 if gap_s else 3)
    traffic = {"concurrency": planned, "prompt_tokens": 42, "output_tokens": 6}
    assert found["traffic"] == traffic


@pytest.mark.parametrize("lengths", [(90, 90), (700, 700), (700, 10)])
def test_the_hint_for_requests_that_are_too_long_is_enough(
    lengths: tuple[int, int],
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beyond the pool, and beyond the model's context, too: on average, or one of them alone."""
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 0, "input_length": size, "output_length": 6} for size in lengths]
    path.write_text("\n".join(map(json.dumps, lines)))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL_DENSE | {"max_position_embeddings": 512}))
    flags = (str(config), "--hardware", str(here), "--workload", str(path), "--num-blocks", "4")
    said = refusal(capsys, *flags)
    assert f"workload: trace has a request of {max(lengths) + 6} tokens" in said
    assert "shorten its requests with --clip 64)" in said
    assert plan(capsys, *flags, "--clip", "64")["workload"]["mid"]["failed"] == 0


def test_who_waits_and_what_is_not_counted_is_noted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--hardware", str(here), "--bound-only", "--no-advice", "--max-running", "2")
    crowded = plan(capsys, *flags, "--concurrency", "8")["notes"]
    assert "6 of 8 requests wait: --max-running is 2" in crowded
    assert any("the gateway of `serve` is a process of about 64 MiB" in note for note in crowded)
    assert not any("wait" in note for note in plan(capsys, *flags, "--concurrency", "2")["notes"])


def test_no_workers_are_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--hardware", str(here), "--bound-only", "--local-workers"]
    assert main([*arguments, "0"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*arguments, "x"])
    assert "--local-workers: invalid int value: 'x'" in capsys.readouterr().err


def test_planning_leaves_the_model_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {each: each.stat().st_mtime_ns for each in BUNDLED_MODEL.iterdir()}
    plan(capsys, "--hardware", str(here), "--bound-only", "--no-advice")
    assert before == {each: each.stat().st_mtime_ns for each in BUNDLED_MODEL.iterdir()}


def test_float16_is_what_config_json_or_a_flag_says(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU torch multiplies it; rounded weights are the kernels' all the same."""
    path = tmp_path / "config.json"
    flags = (str(path), "--hardware", str(here), "--no-advice")
    path.write_text(json.dumps(SMALL_DENSE | {"tie_word_embeddings": True}))
    asked = plan(capsys, *flags, "--dtype", "float16")
    rounded = plan(capsys, *flags, "--dtype", "float16", "--quantize", "int4")
    path.write_text(path.read_text().replace("bfloat16", "float16"))
    stated = plan(capsys, *flags)
    assert stated["memory"] == asked["memory"]
    assert stated["model"]["dtype"] == rounded["model"]["dtype"] == "float16"
    assert rounded["model"]["weights_bytes"] < stated["model"]["weights_bytes"]


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        # A tied head that is stored once is read as well.
        ({"tie_word_embeddings": True, "vocab_size": 64000}, ["--dtype", "float16"]),
        # A prompt that arithmetic alone decides about: the guessed range would go beyond it.
        ({"hidden_size": 1024}, ["--prompt-tokens", "1500"]),
        # Two of 56 cores: what reading hid is no longer hidden.
        ({"hidden_size": 1024}, ["--num-threads", "2", "--quantize", "int4"]),
    ],
)
def test_our_engine_is_never_beyond_the_bound(
    changes: dict[str, Any],
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL_DENSE | changes))
    machine = ("--hardware", "h200-xeon8480c", "--device", "cpu", "--no-advice")
    bound, system = plan(capsys, str(path), *machine, *flags)["estimates"]
    for name in ("ttft_s", "tpot_s"):
        assert bound[name]["mid"] <= system[name]["low"] <= system[name]["mid"], name
    for name in ("output_tokens_per_s", "prompt_tokens_per_s"):
        assert bound[name]["mid"] >= system[name]["high"] >= system[name]["mid"], name


def test_slots_on_a_gpu_are_planned_as_on_an_emulated_device(
    mixtral: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (mixtral, "--hardware", SHEET, "--device-slots", "64", "--quantize", "int4")
    flags += ("--bound-only",)
    emulated = plan(capsys, *flags, "--device", "emulated")
    there = plan(capsys, *flags, "--device", "cuda")
    assert there["memory"] == emulated["memory"]
    assert bound_of(there) == bound_of(emulated)
    assert any("a GPU has the weights of every token in bfloat16" in n for n in there["notes"])


def test_what_a_control_group_grants_is_the_memory_there_is(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this machine: in a container it is the container's that the engine will have."""
    profile = shipped_profile(SHEET)
    assert within_group(profile, 1 << 30).cpu.memory_bytes == 1 << 30
    assert within_group(profile, profile.cpu.memory_bytes) is profile
    monkeypatch.setattr(cgroup, "cgroup_memory_bytes", lambda: 2 << 30)
    flags = (str(BUNDLED_MODEL), "--hardware", str(here), "--bound-only")
    assert plan(capsys, *flags)["memory"]["tiers"]["host"]["limit_bytes"] == 2 << 30
    sheet = plan(capsys, str(BUNDLED_MODEL), "--hardware", SHEET, "--device", "cpu", "--bound-only")
    assert sheet["memory"]["tiers"]["host"]["limit_bytes"] == profile.cpu.memory_bytes
