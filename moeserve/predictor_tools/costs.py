"""What predicting costs beside the model's own steps, measured while the model decodes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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
    """Medians over steps of `rows` sequences. step_us: the model's, without predicting. predict_us:
    inside the predictor. added_us: by how much a step with it was longer than the same without,
    what it pushed out of the caches included; on a busy machine that says little.
    """

    rows: int
    step_us: float
    predict_us: float
    added_us: float

    @property
    def share(self) -> float:
        return self.predict_us / self.step_us


class _Timed:
    """A predictor whose time is counted. is_on: whether it is asked."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.is_on = False
        self.spent_s = 0.0

    def begin_step(self, previous_rows: NDArray[np.int64], recent: NDArray[np.int64]) -> None:
        self.spent_s = 0.0
        if not self.is_on:
            return
        self._predictor.begin_step(previous_rows)
        if self._predictor.recent_tokens:
            started_s = time.perf_counter()
            self._predictor.foresee(recent)
            self.spent_s += time.perf_counter() - started_s

    def predict(self, layer: int, x: Tensor, routing: Routing) -> None:
        if self.is_on:
            started_s = time.perf_counter()
            self._predictor.predict(layer, x, routing)
            self.spent_s += time.perf_counter() - started_s


def measure_cost(loaded: LoadedModel, predictor: Predictor, windows: Tensor) -> Cost:
    """windows: [S, W] token ids; S sequences are decoded side by side, a token each per step.

    The predictor runs where it would while serving: between the layers, its weights as cold as the
    model has left them. Every step is run twice, with and without it, in changing order.
    """
    rows, length = windows.shape
    blocks = -(-rows * length // BLOCK_TOKENS)
    kv = KvPool(loaded.spec, blocks, BLOCK_TOKENS, loaded.dtype, loaded.device)
    slots = torch.arange(rows * length).view(rows, length).to(loaded.device)
    recent = recent_tokens(windows, max(predictor.recent_tokens, 1)).numpy()
    timed = _Timed(predictor)

    def run_step(position: int) -> float:
        """Microseconds, what was spent on predicting included."""
        batch = _decode_batch(windows[:, position], position, slots)
        started_s = time.perf_counter()
        previous = np.arange(rows) if position else np.full(rows, -1)
        timed.begin_step(previous, recent[:, position])
        loaded.model.logits(loaded.model.forward(batch, kv))
        return (time.perf_counter() - started_s) * 1e6

    steps_us, predicts_us, added_us = [], [], []
    with observed(loaded, timed.predict), torch.inference_mode():
        for position in range(length):
            took_us = {}
            for timed.is_on in (True, False) if position % 2 else (False, True):
                took_us[timed.is_on] = run_step(position)
                if timed.is_on:
                    predicts_us.append(timed.spent_s * 1e6)
            steps_us.append(took_us[False])
            added_us.append(took_us[True] - took_us[False])
    skip = min(WARM_UP_STEPS, length // 2)
    median = statistics.median
    return Cost(rows, median(steps_us[skip:]), median(predicts_us[skip:]), median(added_us[skip:]))


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
