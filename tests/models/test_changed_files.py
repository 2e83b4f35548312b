"""Files of weights that somebody writes to while they are in use: an error that names them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moeserve.config import BUNDLED_MODEL, ModelConfig
from moeserve.core import ModelError
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.loader import load_weights
from moeserve.models.pack import pack_model
from moeserve.models.weight_map import whole

CPU = torch.device("cpu")


def overwrite(path: Path) -> None:
    """The last byte, as a copy over the file would."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path)  # the clock of a file system may be coarser than a test is fast


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


@pytest.mark.parametrize(
    ("change", "said"), [(overwrite, "written to while"), (cut, "changed from 8.* to 4.* bytes")]
)
def test_a_checkpoint_that_changes_before_it_is_read(
    change: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2048)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    assert not checkpoint.read("a").any()
    change(path)
    with pytest.raises(ModelError, match=rf"model\.safetensors: {said}"):
        checkpoint.read("a")


def test_a_checkpoint_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """After its last tensor was taken, for one: half of it may be old and half of it new."""
    save_file({"a": torch.zeros(8)}, tmp_path / "model.safetensors")

    def progress(stage: str, fraction: float) -> None:
        if fraction == 0.0:
            weights = checkpoint.read
            checkpoint.read = lambda name: read(weights, name)  # type: ignore[method-assign]

    def read(weights: Callable[[str], Tensor], name: str) -> Tensor:
        found = weights(name)
        overwrite(tmp_path / "model.safetensors")
        return found

    checkpoint = Checkpoint.open(tmp_path)
    rules = [whole("a", "a", (8,))]
    with pytest.raises(ModelError, match="written to while"):
        load_weights(checkpoint, rules, dtype=torch.float32, device=CPU, progress=progress)


def test_a_file_that_is_replaced_is_still_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2048)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    save_file({"b": torch.ones(1)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert not checkpoint.read("a").any()
    path.unlink()
    assert checkpoint.read("a").shape == (2048,)


SERVE = """
import os, sys
from pathlib import Path
from moeserve.config import EngineConfig, ExpertConfig, ModelConfig
from moeserve.core import EngineRequest, ModelError, SamplingParams
from moeserve.engine.engine import Engine

config = EngineConfig(model=ModelConfig(model=sys.argv[1]), experts=ExpertConfig(num_threads=1))
engine = Engine.from_config(config)
engine.add(EngineRequest(request_id="r", token_ids=[1, 2, 3], params=SamplingParams(max_tokens=8)))
engine.step()
(file,) = Path(sys.argv[1]).glob("packed-*.safetensors")
if sys.argv[2] == "cut":
    os.truncate(file, 8192)
else:
    os.utime(file)
try:
    engine.step()
except ModelError as error:
    print(error)
"""


@pytest.mark.parametrize(("how", "said"), [("cut", "to 8192 bytes"), ("write", "written to")])
def test_a_packed_model_that_changes_while_it_serves(how: str, said: str, tmp_path: Path) -> None:
    """In a process of its own: without the check the first of them would end it with SIGBUS."""
    out = pack_model(ModelConfig(model=str(BUNDLED_MODEL)), tmp_path / "packed").path
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(out), how], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"packed-00001-of-00001.safetensors: {'changed' if how == 'cut' else ''}" in done.stdout
    assert said in done.stdout
    assert "pack the model again" in done.stdout
