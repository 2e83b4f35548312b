"""Random attention problems for tests of the native kernels, and their float64 solution."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from support.native_matrices import runtime
from torch import Tensor

from moeserve.cpu_backend import _native as native

#: what rounding the result once to the type may cost, relative
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Shape:
    """A kv row is a key in its first key_dim numbers, a value in value_dim from value_start on."""

    heads: int
    group: int
    key_dim: int
    value_start: int
    value_dim: int
    width: int
    window: int
    sinks: bool
    dtype: torch.dtype


def draw_shape(rng: random.Random) -> Shape:
    dtype = rng.choice(list(ROUNDING))
    window = rng.choice([0, 0, 1, rng.randint(2, 300)])
    sinks = rng.random() < 0.5
    if rng.random() < 0.3:  # latent: the value is a part of the key
        width = rng.choice([rng.randint(1, 100), 96, 576])
        value_dim = rng.randint(1, width)
        return Shape(1, rng.choice([1, 16, 64]), width, 0, value_dim, width, window, sinks, dtype)
    dim = rng.choice([rng.randint(1, 140), 64, 72, 128])
    value_dim = dim if rng.random() < 0.7 else rng.randint(1, 140)
    group = rng.choice([1, rng.randint(2, 9)])
    heads = rng.randint(1, 3)
    return Shape(heads, group, dim, dim, value_dim, dim + value_dim, window, sinks, dtype)


@dataclass(frozen=True)
class Sequence:
    """Tokens of one sequence in the pool. slots: [context]; queries of all of them:
    [context, heads, group, key_dim]."""

    slots: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Problem:
    shape: Shape
    entries: Tensor
    sinks: Tensor | None
    sequences: list[Sequence]

    @property
    def scale(self) -> float:
        return self.shape.key_dim**-0.5

    def attend(self, isa: str, pieces: list[tuple[int, int, int]], num_threads: int = 1) -> Tensor:
        """pieces: (sequence, first token, end token), computed as one batch.

        Returns their rows, [T, heads, group, value_dim].
        """
        spans, queries = [], []
        num_rows = 0
        for index, start, stop in pieces:
            sequence = self.sequences[index]
            spans.append((num_rows, stop - start, stop, sequence.slots[:stop]))
            queries.append(sequence.queries[start:stop])
            num_rows += stop - start
        batch = torch.cat(queries)
        # Rows and heads apart, as in a projection that also holds keys and values.
        held = torch.empty(*batch.shape[:2], batch.shape[2] + 2, batch.shape[3], dtype=batch.dtype)
        held[:, :, :-2] = batch
        out = torch.empty(*batch.shape[:3], self.shape.value_dim, dtype=batch.dtype)
        native.attend(
            runtime(isa, num_threads),
            native.AttentionSpans(spans),
            held[:, :, :-2],
            self.entries,
            self.shape.value_start,
            self.scale,
            self.shape.window,
            self.sinks,
            out,
        )
        return out

    def reference(self, index: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The result in float64, and the mean of absolute values that it was mixed from."""
        shape, sequence = self.shape, self.sequences[index]
        context = self.entries[sequence.slots[:stop]].double().transpose(0, 1)  # [heads, C, width]
        keys = context[..., : shape.key_dim]
        values = context[..., shape.value_start : shape.value_start + shape.value_dim]
        queries = sequence.queries[start:stop].double().permute(1, 2, 0, 3)  # [heads, G, r, D]
        scores = queries @ keys[:, None].mT * self.scale
        distance = torch.arange(start, stop)[:, None] - torch.arange(stop)
        hidden = distance < 0
        if shape.window:
            hidden |= distance >= shape.window
        scores.masked_fill_(hidden, -torch.inf)
        if self.sinks is not None:
            column = self.sinks.double()[:, :, None, None].expand(-1, -1, stop - start, -1)
            scores = torch.cat((scores, column), dim=-1)
        weights = scores.softmax(-1)[..., :stop]
        mixed = (weights @ values[:, None]).permute(2, 0, 1, 3)
        return mixed, (weights @ values[:, None].abs()).permute(2, 0, 1, 3)


def draw_problem(
    shape: Shape, contexts: list[int], generator: torch.Generator, sharpness: float = 1.0
) -> Problem:
    """Tokens lie anywhere in the pool. sharpness: factor of the queries."""
    total = sum(contexts)
    places = torch.randperm(total + 7, generator=generator)
    entries = torch.randn(total + 7, shape.heads, shape.width, generator=generator)
    sequences = []
    for context in contexts:
        slots, places = places[:context].clone(), places[context:]
        queries = torch.randn(context, shape.heads, shape.group, shape.key_dim, generator=generator)
        sequences.append(Sequence(slots, (sharpness * queries).to(shape.dtype)))
    sinks = 2 * torch.randn(shape.heads, shape.group, generator=generator) if shape.sinks else None
    return Problem(shape, entries.to(shape.dtype), sinks, sequences)
