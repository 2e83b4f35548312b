"""What most tests of the planner plan, and from what."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.engine_profile import made_profile, read_config
from support.small_plans import CONFIG

from moeserve.experts.schedule.profile import Profile
from moeserve.planner.shapes import ModelShape


@pytest.fixture
def shape(tmp_path: Path) -> ModelShape:
    return read_config(tmp_path, CONFIG)


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return made_profile(tmp_path)
