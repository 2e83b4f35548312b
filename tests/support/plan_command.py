"""`moeserve plan` as a user calls it, for a data sheet or a made profile of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from moeserve import __version__
from moeserve.cli import main
from moeserve.experts.schedule.profile import DiskPoint, Figure
from moeserve.experts.schedule.profile_file import encode_profile, shipped_profile
from moeserve.planner.hardware import this_hardware

SHEET = "rtx4090-pcie4"


def write_profile_of_here(path: Path) -> None:
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
    path.write_bytes(encode_profile(profile))


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
