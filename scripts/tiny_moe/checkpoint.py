"""What a training run needs to go on: tensors in safetensors files, numbers in one JSON file.

Tensor files carry the step they belong to in their names. The JSON names the ones that are valid
and is replaced last, by renaming, so a run that is killed at any moment leaves a whole state: the
new one or the one before. Nothing is pickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = "checkpoint.json"
RNG = "rng"


class CheckpointError(RuntimeError):
    """A saved state cannot be read; names the file and the way out."""


def has_state(work_dir: Path) -> bool:
    return (work_dir / STATE).exists()


def save_tensors(work_dir: Path, purpose: str, step: int, tensors: dict[str, Tensor]) -> str:
    """Writes a tensor file and returns its name. It counts once a state names it."""
    path = work_dir / f"{purpose}-{step}.safetensors"
    partial = path.with_suffix(".partial")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
    partial.replace(path)
    return path.name


def save_state(work_dir: Path, files: dict[str, str], numbers: dict[str, Any]) -> None:
    """Makes `files` (purpose to file name) and `numbers` the state; removes what it replaces."""
    path = work_dir / STATE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"files": files, **numbers}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    for purpose, current in files.items():
        for old in work_dir.glob(f"{purpose}-*.safetensors"):
            if old.name != current:
                old.unlink()


def load_state(work_dir: Path) -> dict[str, Any]:
    """The numbers last saved, with `files`. Raises CheckpointError where they cannot be read."""
    path = work_dir / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: nothing was trained there yet") from None
    except ValueError as error:
        raise _broken(path, error) from error
    return state


def load_tensors(work_dir: Path, file_name: str) -> dict[str, Tensor]:
    """Reads a tensor file. Raises CheckpointError when it is missing, cut short or garbled."""
    path = work_dir / file_name
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _broken(path, error) from error


def pack(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a step reads and changes: weights, moments, the state of torch's generator."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    return tensors | {RNG: torch.get_rng_state()}


def unpack(
    tensors: dict[str, Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """The inverse of `pack`, in place. Rates and the like stay as `optimizer` was made."""
    weights: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "model":
            weights[name] = tensor
        elif kind == "optimizer":
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = tensor
    model.load_state_dict(weights)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    torch.set_rng_state(tensors[RNG])


def _broken(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({error}); delete {path.parent} to train from the start"
    )
