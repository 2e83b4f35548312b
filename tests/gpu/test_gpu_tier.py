"""Slots for experts on the device under test, the others on the CPU: every family against
transformers in float32, the engine against the CPU alone, and every packed format."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.device_tier_checks import MOE_FAMILIES, check_engine, check_family, name_of
from support.packed_numbers import FORMS, cols_of, fill, numbers

from moeserve.config import BUNDLED_MODEL, ModelConfig
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedWeight, PackFormat
from moeserve.experts.device.packed_tensors import PackedMatrices
from moeserve.models.pack import pack_model

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


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_two_and_three_tiers_of_a_packed_model(
    quantize: str, device: torch.device, tmp_path: Path
) -> None:
    floats = None if quantize == "none" else False  # inputs are no integers on either side
    config = ModelConfig(
        model=str(BUNDLED_MODEL), dtype="float32", quantize=quantize, quantize_activations=floats
    )
    path = pack_model(config, tmp_path / "packed").path
    rng = random.Random(5)
    check_engine(name_of(device), rng, path)
    check_engine(name_of(device), rng, path, host_slots=rng.randint(2, 40))
    check_engine(name_of(device), rng, path, host_memory_bytes=rng.randint(1 << 20, 4 << 20))


@pytest.mark.parametrize("form", FORMS, ids=PackFormat.describe)
def test_packed_numbers_are_read_there(form: PackFormat, device: torch.device) -> None:
    rng, generator = random.Random(6), torch.Generator().manual_seed(6)
    stored = PackedWeight(NativeRuntime(1).handle, (70, cols_of(form, rng)), form)
    fill(stored, generator)
    record = torch.from_numpy(stored.data)[None].to(device)
    found = PackedMatrices(stored.layout, 0, 70).unpack(record, torch.float32)
    expected = stored.numbers()
    torch.testing.assert_close(numbers(found)[0].float().cpu(), expected, rtol=1e-6, atol=0)
