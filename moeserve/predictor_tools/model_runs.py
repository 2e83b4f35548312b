"""Runs a model over windows of tokens, each by itself from its first token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moeserve.config import ExpertConfig, ModelConfig
from moeserve.cpu_backend.threads import torch_threads, use_threads
from moeserve.experts.runtime import Observer
from moeserve.models.inputs import ForwardBatch, Span
from moeserve.models.kv_pool import KvPool
from moeserve.models.registry import LoadedModel, Progress, load_model

#: tokens of a step: enough that products are efficient, few enough to show progress
STEP_TOKENS = 2048
BLOCK_TOKENS = 16


@contextmanager
def loaded_model(
    config: ModelConfig, experts: ExpertConfig, progress: Progress
) -> Iterator[LoadedModel]:
    """A model and this process's compute threads. Raises ModelError, ConfigError."""
    use_threads(experts.num_threads)
    loaded = load_model(config, experts, progress)
    try:
        yield loaded
    finally:
        loaded.close()


@contextmanager
def observed(loaded: LoadedModel, observer: Observer) -> Iterator[None]:
    """Tells the observer of every layer that runs. Meanwhile threads are the engine's."""
    observers = loaded.runtime.observers
    observers.append(observer)
    try:
        with engine_threads(loaded):
            yield
    finally:
        observers.remove(observer)


@contextmanager
def engine_threads(loaded: LoadedModel) -> Iterator[None]:
    """Threads as in an engine: where native ones compute, torch's are in their way."""
    count = torch.get_num_threads() if loaded.runtime.native is None else 1
    with torch_threads(count):
        yield


class WindowRunner:
    """Computes windows of one length; who wants to know what the layers did observes them."""

    def __init__(self, loaded: LoadedModel, window_tokens: int) -> None:
        self._loaded = loaded
        self._window_tokens = window_tokens
        self.windows_per_step = max(1, STEP_TOKENS // window_tokens)
        blocks = -(-self.windows_per_step * window_tokens // BLOCK_TOKENS)
        self._kv = KvPool(loaded.spec, blocks, BLOCK_TOKENS, loaded.dtype, loaded.device)
        self._step = 0

    def run(self, windows: Tensor) -> None:
        """windows: [B, window_tokens] token ids, at most windows_per_step of them."""
        count, length = windows.shape
        slots = torch.arange(count * length).view(count, length).to(self._loaded.device)
        spans = [
            Span(number * length, (number + 1) * length, length, own, length)
            for number, own in enumerate(slots)
        ]
        batch = ForwardBatch(
            token_ids=windows.flatten().to(self._loaded.device),
            positions=torch.arange(length).repeat(count).to(self._loaded.device),
            kv_write_slots=slots.flatten(),
            spans=tuple(spans),
            step=self._step,
        )
        self._step += 1
        with torch.inference_mode():
            self._loaded.model.forward(batch, self._kv)
