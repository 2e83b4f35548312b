"""Records a model over a text and trains gate_residual on it, resumable after a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from moeserve.core import ModelError
from moeserve.models.gates import model_gates
from moeserve.models.packed_model import config_sha256
from moeserve.models.registry import LoadedModel
from moeserve.predictor_tools.model_runs import WindowRunner
from moeserve.predictor_tools.recording import Plan, Recording
from moeserve.predictors.gates import LayerGate, check_gates
from moeserve.predictors.residual_weights import (
    PARTS,
    ResidualShape,
    ResidualWeights,
    TrainedPredictor,
)
from moeserve.predictors.train_residual import EPOCHS, ViewData, train_view

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class TrainingPlan:
    """windows: [N, W] token ids to learn from."""

    windows: Tensor
    shape: ResidualShape
    epochs: int = EPOCHS


def train_residual(
    loaded: LoadedModel, plan: TrainingPlan, work_dir: Path, progress: Progress
) -> TrainedPredictor:
    """work_dir: holds what is done so far; an interrupted run goes on from there. The same plan
    gives the same weights, interrupted or not.

    Raises ModelError for a model with fewer than two MoE layers, or with layers that differ.
    """
    gates = model_gates(loaded.model)
    if len(gates) < 2:
        raise ModelError(f"predictor: {len(gates)} MoE layers; there is none to look ahead to")
    check_gates(gates)
    started_s = time.monotonic()
    recording = record_states(loaded, gates, plan.windows, work_dir, progress)
    recorded_s = time.monotonic() - started_s
    views = {}
    for place, gate in enumerate(gates[:-1]):
        targets = gates[place + 1 : place + 1 + plan.shape.depth]
        stage = f"layer {gate.layer}"

        def report(share: float, stage: str = stage) -> None:
            progress(stage, share)

        view = ViewFile(work_dir, recording, plan, gate.layer)
        views[gate.layer] = view.load() or view.train(recording, gate, targets, report)
    facts = {
        "tokens": plan.windows.numel(),
        "window_tokens": plan.windows.shape[1],
        "epochs": plan.epochs,
        "recorded_s": round(recorded_s, 1),
        "trained_s": round(time.monotonic() - started_s - recorded_s, 1),
    }
    return TrainedPredictor(recording.plan.config_sha256, plan.shape, views, facts)


def record_states(
    loaded: LoadedModel,
    gates: Sequence[LayerGate],
    windows: Tensor,
    work_dir: Path,
    progress: Progress,
) -> Recording:
    """The recording of these windows, what is missing of it run now."""
    layers = tuple(gate.layer for gate in gates)
    key = Plan(config_sha256(loaded.path), layers, gates[0].top_k, loaded.spec.hidden_size, windows)
    recording = Recording(work_dir, key)
    if not recording.complete:
        runner = WindowRunner(loaded, windows.shape[1])
        recording.record(loaded, runner, lambda share: progress("running the text", share))
    return recording


class ViewFile:
    """The trained view of one layer in the work directory."""

    def __init__(
        self, work_dir: Path, recording: Recording, plan: TrainingPlan, layer: int
    ) -> None:
        about = json.dumps([recording.plan.key, asdict(plan.shape), plan.epochs])
        digest = hashlib.sha256(about.encode()).hexdigest()[:16]
        self._path = work_dir / f"view-{layer}-{digest}.safetensors"
        self._epochs = plan.epochs
        self._shape = plan.shape

    def load(self) -> ResidualWeights | None:
        """What an earlier run has finished."""
        if not self._path.exists():
            return None
        tensors: Mapping[str, Tensor] = load_file(self._path)
        return ResidualWeights(**{name: tensors[name] for name in PARTS})

    def train(
        self,
        recording: Recording,
        source: LayerGate,
        targets: Sequence[LayerGate],
        progress: Callable[[float], None],
    ) -> ResidualWeights:
        """Trains it and keeps it."""
        data = ViewData(
            states=recording.states(source.layer),
            next_states=recording.states(targets[0].layer),
            ids=recording.ids(source.layer),
            weights=recording.weights(source.layer),
            later_ids=[recording.ids(target.layer) for target in targets],
            follows=recording.follows(),
        )
        view = train_view(data, source, targets, self._shape, progress, self._epochs)
        partial = self._path.with_suffix(".partial")
        save_file({name: getattr(view, name) for name in PARTS}, partial)
        partial.replace(self._path)
        return view


def remove_work(work_dir: Path) -> None:
    """Deletes a work directory, of which the result has been saved."""
    shutil.rmtree(work_dir)
