"""What tests of tiers compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engine_answers import make_engine

from moeserve.engine.engine import Engine


@pytest.fixture(scope="module")
def resident(packed: Path) -> Iterator[Engine]:
    """The packed model with all experts in memory."""
    engine = make_engine(packed)
    yield engine
    engine.close()
