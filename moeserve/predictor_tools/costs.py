"""What predicting costs beside the model's own steps, measured while the model decodes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeserve.core import Routing
from moeserve.models.inputs import ForwardBatch, Span
from moeserve.models.kv_pool import KvPool
from moeserve.models.registry import LoadedModel
from moeserve.predictor_tools.model_runs import BLOCK_TOKENS, observed
from moeserve.predictors.base import Predictor
from moeserve.text_windows import recent_tokens

WARM_UP_STEPS = 20


@dataclass(frozen=True)
class Cost:
    """Medians over steps of `rows` sequences. step_us: the model's, without predicting."""

    rows: int
    step_us: float
    predict_us: float

    @property
    def share(self) -> float:
        return self.predict_us / self.step_us


def measure_cost(loaded: LoadedModel, predictor: Predictor, windows: Tensor) -> Cost:
    """windows: [S, W] token ids; S sequences are decoded side by side, a token each per step.

    The predictor runs where it would while serving: between the layers, its weights as cold as the
    model has left them.
    """
    rows, length = windows.shape
    blocks = -(-rows * length // BLOCK_TOKENS)
    kv = KvPool(loaded.spec, blocks, BLOCK_TOKENS, loaded.dtype, loaded.device)
    slots = torch.arange(rows * length).view(rows, length).to(loaded.device)
    recent = recent_tokens(windows, max(predictor.recent_tokens, 1))
    spent_s = 0.0

    def predict(layer: int, x: Tensor, routing: Routing) -> None:
        nonlocal spent_s
        started_s = time.perf_counter()
        predictor.predict(layer, x, routing)
        spent_s += time.perf_counter() - started_s

    steps_us, predicts_us = [], []
    with observed(loaded, predict), torch.inference_mode():
        for position in range(length):
            batch = _decode_batch(windows[:, position], position, slots)
            spent_s = 0.0
            previous = np.arange(rows) if position else np.full(rows, -1)
            started_s = time.perf_counter()
            predictor.begin_step(previous)
            if predictor.recent_tokens:
                tokens = recent[:, position].numpy()
                foreseen_s = time.perf_counter()
                predictor.foresee(tokens)
                spent_s += time.perf_counter() - foreseen_s
            loaded.model.logits(loaded.model.forward(batch, kv))
            took_s = time.perf_counter() - started_s
            steps_us.append((took_s - spent_s) * 1e6)
            predicts_us.append(spent_s * 1e6)
    skip = min(WARM_UP_STEPS, length // 2)
    return Cost(rows, statistics.median(steps_us[skip:]), statistics.median(predicts_us[skip:]))


def _decode_batch(tokens: Tensor, position: int, slots: Tensor) -> ForwardBatch:
    """tokens: [S], the ones at `position` of each sequence. slots: [S, W] kv slots."""
    device = slots.device
    stop = position + 1
    spans = [Span(row, row + 1, stop, own[:stop], stop) for row, own in enumerate(slots)]
    return ForwardBatch(
        token_ids=tokens.to(device),
        positions=torch.full((len(tokens),), position, device=device),
        kv_write_slots=slots[:, position].contiguous(),
        spans=tuple(spans),
        step=position,
    )
