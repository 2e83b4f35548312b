"""Loaded models, run step by step without an engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moeserve.config import ExpertConfig, ModelConfig
from moeserve.models.inputs import ForwardBatch, Span
from moeserve.models.kv_pool import KvPool
from moeserve.models.registry import LoadedModel, load_model


def load_native(path: Path | str, **settings: object) -> LoadedModel:
    """On the native backend. settings: of ModelConfig."""
    config = ModelConfig(**{"model": str(path), **settings})  # type: ignore[arg-type]
    return load_model(config, ExpertConfig(cpu_backend="native"))


@dataclass
class BlockSequence:
    """Tokens, how many of them have kv, and the blocks that hold it."""

    token_ids: list[int]
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0


class Runner:
    """The least of an engine: block tables by hand, in blocks that lie anywhere in the pool."""

    def __init__(self, loaded: LoadedModel, num_blocks: int = 128, block_tokens: int = 4) -> None:
        self.loaded = loaded
        self.block_tokens = block_tokens
        self.kv = KvPool(loaded.spec, num_blocks, block_tokens, loaded.dtype, loaded.device)
        self.free = list(range(num_blocks))
        random.Random(0).shuffle(self.free)
        self.num_steps = 0

    def step(self, work: Sequence[tuple[BlockSequence, int]]) -> list[Tensor]:
        """Computes that many more tokens of each sequence; their logits, [n, V] each."""
        device = self.loaded.device
        token_ids: list[int] = []
        positions: list[int] = []
        writes: list[Tensor] = []
        spans: list[Span] = []
        for sequence, num_tokens in work:
            start, stop = sequence.num_computed, sequence.num_computed + num_tokens
            while len(sequence.block_ids) * self.block_tokens < stop:
                sequence.block_ids.append(self.free.pop())
            blocks = torch.tensor(sequence.block_ids)[:, None] * self.block_tokens
            slots = (blocks + torch.arange(self.block_tokens)).flatten()[:stop]
            row = len(token_ids)
            token_ids += sequence.token_ids[start:stop]
            positions += range(start, stop)
            writes.append(slots[start:])
            length = len(sequence.token_ids)
            spans.append(Span(row, row + num_tokens, stop, slots.to(device), length))
            sequence.num_computed = stop
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            kv_write_slots=torch.cat(writes).to(device),
            spans=tuple(spans),
            step=self.num_steps,
        )
        self.num_steps += 1
        with torch.inference_mode():
            logits = self.loaded.model.logits(self.loaded.model.forward(batch, self.kv))
        return [logits[span.start : span.stop].cpu() for span in spans]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        return self.step([(BlockSequence(list(token_ids)), len(token_ids))])[0]

    def extend(self, sequence: BlockSequence, logits: Tensor) -> None:
        sequence.token_ids.append(int(logits[-1].argmax()))

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        sequence = BlockSequence(list(prompt))
        while len(sequence.token_ids) < len(prompt) + num_tokens:
            left = len(sequence.token_ids) - sequence.num_computed
            self.extend(sequence, self.step([(sequence, left)])[0])
        return sequence.token_ids[len(prompt) :]
