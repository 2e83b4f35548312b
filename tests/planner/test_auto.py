"""`serve --auto`: settings from a search in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs
from support.plan_command import SHEET, write_profile_of_here

from moeserve import __version__
from moeserve.cli import main
from moeserve.config import EngineConfig, ExpertConfig, KvConfig, SchedulerConfig
from moeserve.core import ConfigError
from moeserve.experts.schedule.profile_file import encode_profile, shipped_profile
from moeserve.planner.auto import tune
from moeserve.planner.hardware import default_profile_path
from moeserve.planner.plan_types import Traffic
from moeserve.planner.search import SEARCHED

TRAFFIC = Traffic(concurrency=2, prompt_tokens=100, output_tokens=8)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def calibrated(cache: Path) -> Path:
    """This machine, by the rates of a data sheet."""
    path = default_profile_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_profile_of_here(path)
    return path


def test_what_is_found_is_served_and_what_is_given_stays(calibrated: Path) -> None:
    asked = EngineConfig(
        scheduler=SchedulerConfig(max_batch_tokens=16, max_running=5),
        experts=ExpertConfig(cpu_backend="native", num_threads=1),
    )
    tuned = tune(asked, TRAFFIC)
    assert tuned.engine.model == asked.model
    assert tuned.engine.scheduler == asked.scheduler
    assert tuned.engine.experts.cpu_backend == "native"
    assert tuned.engine.experts.num_threads == 1
    assert "settings planned" in tuned.words[0]
    assert "expected with 2 requests at once" in tuned.words[1]


def test_what_is_given_stays_although_it_is_the_default(calibrated: Path) -> None:
    default = SchedulerConfig().max_batch_tokens
    tuned = tune(EngineConfig(), TRAFFIC, ["max_batch_tokens", "num_threads", "kv_bytes"])
    assert tuned.engine.scheduler.max_batch_tokens == default
    assert tuned.engine.experts.num_threads is None
    assert tuned.engine.kv == KvConfig()


@pytest.mark.parametrize("given", [(), ("--max-batch-tokens", "512")])
def test_the_command_searches_for_all_that_was_not_given(
    given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 is the default, too: given, it stays."""
    seen: list[frozenset[str]] = []

    def stop(engine: EngineConfig, traffic: Traffic, names: frozenset[str]) -> None:
        assert engine == EngineConfig()
        seen.append(names)
        raise ConfigError("far enough")

    monkeypatch.setattr("moeserve.planner.auto.tune", stop)
    assert main(["serve", "--auto", "--expect-concurrency", "3", *given]) == 2
    assert (seen[0] & set(SEARCHED)) == {"max_batch_tokens" for _ in given[:1]}


def test_a_search_that_takes_too_long_is_said_so(calibrated: Path) -> None:
    with pytest.raises(ConfigError, match="auto: no settings found within 0 s"):
        tune(EngineConfig(), TRAFFIC, longest_s=0.01)


def test_without_calibration_it_is_said_what_to_do(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"auto: .*not calibrated.*moeserve calibrate"):
        tune(EngineConfig(), TRAFFIC)


def test_a_profile_of_another_machine_is_refused(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = shipped_profile(SHEET)
    other = structs.replace(sheet, source="measured", moeserve=__version__)
    calibrated.write_bytes(encode_profile(other))
    assert main(["serve", "--auto"]) == 2
    assert "is of another machine" in capsys.readouterr().err


def test_expectations_are_for_auto_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--expect-concurrency", "3"]) == 2
    assert "expect_concurrency: it is for --auto" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["concurrency", "prompt_tokens", "output_tokens"])
def test_an_expectation_of_nothing_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = "--expect-" + name.replace("_", "-")
    assert main(["serve", "--auto", flag, "0"]) == 2
    assert f"expect_{name}: 0 is below the minimum 1" in capsys.readouterr().err


def test_of_one_token_no_time_of_further_ones_is_expected(calibrated: Path) -> None:
    one = replace(TRAFFIC, output_tokens=1)
    words = tune(EngineConfig(), one).words[1]
    assert "output tokens/s" in words
    assert "for each" not in words


def test_workers_are_not_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--auto", "--local-workers", "2"]) == 2
    assert "local_workers: a plan knows no expert workers" in capsys.readouterr().err


def test_a_gateway_that_searches_imports_no_torch() -> None:
    code = "import sys, moeserve.planner.auto; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
