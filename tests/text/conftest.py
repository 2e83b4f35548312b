from __future__ import annotations

from pathlib import Path

import pytest
import text_models


@pytest.fixture(scope="session")
def byte_level_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_models.byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def byte_fallback_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_models.byte_fallback(tmp_path_factory.mktemp("byte_fallback"))


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback"])
def model_path(request: pytest.FixtureRequest) -> Path:
    """A directory of each kind."""
    path: Path = request.getfixturevalue(f"{request.param}_path")
    return path
