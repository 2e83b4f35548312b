"""What a model's MoE layers saw and chose over a text, on disk: a killed run can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeserve.core import ConfigError, Routing
from moeserve.models.registry import LoadedModel
from moeserve.predictor_tools.model_runs import WindowRunner, observed
from moeserve.predictors.gate_residual import unit_state

FORMAT_VERSION = 1
PROGRESS = "recording.json"


@dataclass(frozen=True)
class Plan:
    """What is to be recorded. Two recordings with equal plans are equal.

    windows: [N, W] token ids. top_k, hidden_size: of all MoE layers `layers`.
    """

    config_sha256: str
    layers: tuple[int, ...]
    top_k: int
    hidden_size: int
    windows: Tensor

    @property
    def key(self) -> str:
        """A digest of all of it."""
        text = f"{FORMAT_VERSION} {self.config_sha256} {self.layers} {list(self.windows.shape)}"
        tokens = np.ascontiguousarray(self.windows.numpy()).tobytes()
        return hashlib.sha256(text.encode() + tokens).hexdigest()


class Recording:
    """One folder: per MoE layer the inputs' unit states (float16) and sizes, expert ids and router
    weights of rows in the order of the windows. A row counts once the progress file says so."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Goes on with what is in the folder if it is of the same plan, else starts afresh."""
        self.folder = folder
        self.plan = plan
        folder.mkdir(parents=True, exist_ok=True)
        self.num_windows = self._read_progress()

    @property
    def complete(self) -> bool:
        return self.num_windows == len(self.plan.windows)

    def record(
        self,
        loaded: LoadedModel,
        runner: WindowRunner,
        progress: Callable[[float], None],
    ) -> None:
        """Runs the windows that are missing. runner: of `loaded`."""
        files = {name: self._open(name) for name in self._widths()}

        def write(layer: int, x: Tensor, routing: Routing) -> None:
            sizes = x.float().square().mean(dim=-1).sqrt().cpu()
            states = unit_state(x).to(device="cpu", dtype=torch.float16)
            files[f"{layer}.sizes"].write(sizes.numpy().tobytes())
            files[f"{layer}.states"].write(states.numpy().tobytes())
            files[f"{layer}.ids"].write(routing.ids.cpu().numpy().astype(np.uint16).tobytes())
            weights = routing.weights.cpu().numpy().astype(np.float16)
            files[f"{layer}.weights"].write(weights.tobytes())

        try:
            with observed(loaded, write):
                while not self.complete:
                    start = self.num_windows
                    windows = self.plan.windows[start : start + runner.windows_per_step]
                    runner.run(windows)
                    for file in files.values():
                        file.flush()
                    self._write_progress(start + len(windows))
                    progress(self.num_windows / len(self.plan.windows))
        finally:
            for file in files.values():
                file.close()

    def states(self, layer: int) -> Tensor:
        """[N, H] float16, unit states; mapped, so that a model's worth of them need not fit."""
        return torch.from_numpy(self._read(f"{layer}.states", np.float16))

    def sizes(self, layer: int) -> Tensor:
        """[N, 1] float32: what unit states are to be multiplied by to be the layer's inputs."""
        return torch.from_numpy(self._read(f"{layer}.sizes", np.float32))

    def ids(self, layer: int) -> Tensor:
        """[N, K] int32."""
        return torch.from_numpy(self._read(f"{layer}.ids", np.uint16).astype(np.int32))

    def weights(self, layer: int) -> Tensor:
        """[N, K] float32."""
        return torch.from_numpy(self._read(f"{layer}.weights", np.float16).astype(np.float32))

    def follows(self) -> Tensor:
        """[N] bool: whether the row before is the token before."""
        known = torch.ones(self.plan.windows.shape, dtype=torch.bool)
        known[:, 0] = False
        return known.flatten()

    def _widths(self) -> dict[str, int]:
        """Bytes of a row, by name of file."""
        plan = self.plan
        widths = {}
        for layer in plan.layers:
            widths[f"{layer}.states"] = 2 * plan.hidden_size
            widths[f"{layer}.sizes"] = 4
            widths[f"{layer}.ids"] = widths[f"{layer}.weights"] = 2 * plan.top_k
        return widths

    def _open(self, name: str) -> Any:
        """For appending, after the rows that count: a killed run may have left parts of others."""
        path = self.folder / name
        rows = self.num_windows * self.plan.windows.shape[1]
        path.touch()
        file = path.open("r+b")
        file.truncate(rows * self._widths()[name])
        file.seek(0, 2)
        return file

    def _read(self, name: str, dtype: type) -> np.ndarray[Any, Any]:
        width = self._widths()[name] // np.dtype(dtype).itemsize
        shape = (self.plan.windows.numel(), width)
        return np.memmap(self.folder / name, dtype, mode="c", shape=shape)

    def _read_progress(self) -> int:
        path = self.folder / PROGRESS
        if not path.exists():
            return 0
        try:
            found: Mapping[str, Any] = json.loads(path.read_text())
            return int(found["windows"]) if found["key"] == self.plan.key else 0
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ConfigError(
                f"work_dir: {path} is broken: {error}", field="work_dir", hint="remove the folder"
            ) from error

    def _write_progress(self, num_windows: int) -> None:
        path = self.folder / (PROGRESS + ".partial")
        path.write_text(json.dumps({"key": self.plan.key, "windows": num_windows}))
        path.replace(self.folder / PROGRESS)
        self.num_windows = num_windows
