"""Slots for experts on the device under test, the others on the CPU: every family against
transformers in float32, and the engine against the CPU alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.device_tier_checks import MOE_FAMILIES, check_engine, check_family, name_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model_type", MOE_FAMILIES)
def test_a_family_with_slots(
    model_type: str,
    device: torch.device,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    error = check_family(model_type, name_of(device), random.Random(4), tmp_path)
    record_property("max_relative_error", f"{error:.1e}")


@pytest.mark.parametrize("seed", range(3))
def test_the_engine_with_slots(seed: int, device: torch.device) -> None:
    check_engine(name_of(device), random.Random(seed))
