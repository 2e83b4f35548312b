"""Tests that run on a GPU. `MOESERVE_TEST_DEVICE=cpu` runs the same tests dry, on the CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# The models and the runner of the parity tests are the same on every device.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test; skips where it is not there."""
    device = torch.device(os.environ.get("MOESERVE_TEST_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"no CUDA device is visible to torch {torch.__version__}")
    # float32 means float32: TF32 keeps 10 bits of the mantissa, too few for the bounds here.
    torch.set_float32_matmul_precision("highest")
    return device
