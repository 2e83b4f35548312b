"""Norm, clipping, rotation and the way into the kv pool, against float64."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native_attention import ROUNDING
from support.native_matrices import LEVELS, runtime
from torch import Tensor

from moeserve.cpu_backend import _native as native

EACH_LEVEL = pytest.mark.parametrize("isa", LEVELS)
SEEDS = st.integers(0, 2**31)


def draw_turns(num_rows: int, dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    angles = torch.randn(num_rows, 1, 1, dim // 2, generator=generator)
    angles = torch.cat((angles, angles), dim=-1)
    sign = torch.ones(dim)
    sign[: dim // 2] = -1
    return angles.cos(), angles.sin() * sign


def turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """x: [T, a, b, dim] float64."""
    cosine, sine = (turn.double() for turn in turns)
    return x * cosine + x.roll(x.shape[-1] // 2, -1) * sine


def normed(x: Tensor, weight: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return x / (x.square().mean(dims, keepdim=True) + eps).sqrt() * weight


def check_close(got: Tensor, expected: Tensor) -> None:
    bound = ROUNDING[got.dtype] * expected.abs() + 2e-6
    assert ((got.double() - expected).abs() <= bound).all()


@EACH_LEVEL
@settings(max_examples=30)
@given(seed=SEEDS, num_threads=st.integers(1, 3))
def test_grouped_heads(isa: str, seed: int, num_threads: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    heads, group, num_rows = rng.randint(1, 4), rng.randint(1, 9), rng.choice([1, 5, 130])
    dim = rng.choice([rng.randint(2, 140), 64, 128])
    rope_dim = rng.choice([2 * rng.randint(1, dim // 2), dim // 2 * 2])
    dtype = rng.choice(list(ROUNDING))
    qkv = torch.randn(num_rows, heads, group + 2, dim, generator=generator).to(dtype)
    norm = rng.choice(["none", "head", "projection"])
    clip = rng.choice([float("inf"), 1.5])
    eps = 1e-5
    shared = norm == "head"
    weight = 1 + torch.randn(1 if shared else heads, group + 1, dim, generator=generator) / 4
    turns = draw_turns(num_rows, rope_dim, generator)
    slots = torch.randperm(num_rows + 3, generator=generator)[:num_rows]

    expected = qkv.double()
    queries, keys = expected[:, :, :group], expected[:, :, group : group + 1]
    if norm != "none":
        dims = (-1,) if shared else (1, 2, 3)
        queries = normed(queries, weight[:, :group].double(), dims, eps)
        keys = normed(keys, weight[:, group:].double(), dims, eps)
    expected = torch.cat((queries, keys, expected[:, :, group + 1 :]), dim=2).clamp(-clip, clip)
    rotated = turned(expected[:, :, : group + 1, :rope_dim], turns)
    expected[:, :, : group + 1, :rope_dim] = rotated

    entries = torch.zeros(num_rows + 3, heads, 2 * dim, dtype=dtype)
    held = qkv.clone()
    arguments = (None if norm == "none" else weight, norm == "projection", eps, clip)
    native.prepare_grouped(runtime(isa, num_threads), held, *turns, *arguments, entries, slots)
    check_close(held[:, :, :group], expected[:, :, :group])
    check_close(entries[slots], expected[:, :, group:].flatten(2))
    untouched = torch.ones(num_rows + 3, dtype=torch.bool)
    untouched[slots] = False
    assert (entries[untouched] == 0).all()

    row = rng.randrange(num_rows)
    alone, place = qkv[row : row + 1].clone(), torch.zeros_like(entries)
    turn = (turns[0][row : row + 1], turns[1][row : row + 1])
    native.prepare_grouped(runtime(isa, 1), alone, *turn, *arguments, place, slots[row : row + 1])
    assert torch.equal(alone[0, :, :group], held[row, :, :group])
    assert torch.equal(place[slots[row]], entries[slots[row]])


@EACH_LEVEL
@settings(max_examples=20)
@given(seed=SEEDS)
def test_latent_heads(isa: str, seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_rows, heads = rng.choice([1, 40]), rng.randint(1, 20)
    rank, dim = rng.choice([rng.randint(1, 200), 512]), 2 * rng.randint(1, 40)
    dtype = rng.choice(list(ROUNDING))
    latents = torch.randn(num_rows, rank + dim, generator=generator).to(dtype)
    queries = torch.randn(num_rows, heads, rank + dim, generator=generator).to(dtype)
    weight = 1 + torch.randn(rank, generator=generator) / 4
    turns = draw_turns(num_rows, dim, generator)
    slots = torch.randperm(num_rows + 3, generator=generator)[:num_rows]
    entries = torch.zeros(num_rows + 3, 1, rank + dim, dtype=dtype)
    held = queries.clone()
    native.prepare_latent(
        runtime(isa, 2), latents, held[..., rank:], *turns, weight, 1e-6, entries, slots
    )
    assert torch.equal(held[..., :rank], queries[..., :rank])
    check_close(held[..., rank:], turned(queries[:, None, :, rank:].double(), turns)[:, 0])
    expected = latents.double()
    expected[:, rank:] = turned(expected[:, None, None, rank:], turns)[:, 0, 0]
    expected[:, :rank] = normed(expected[:, :rank], weight.double(), (-1,), 1e-6)
    check_close(entries[slots, 0], expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qkv", torch.zeros(2, 1, 4, 16, dtype=torch.int64), "qkv: must be float32"),
        ("qkv", torch.zeros(2, 1, 16, 4).mT, "qkv: is not contiguous"),
        ("qkv", torch.zeros(2, 1, 2, 16), "qkv: shape .*: no query heads"),
        ("cosine", torch.zeros(2, 1, 1, 18), "cosine: shape"),
        ("cosine", torch.zeros(3, 1, 1, 8), "cosine: shape"),
        ("cosine", torch.zeros(2, 1, 1, 7), "cosine: shape"),
        ("sine", torch.zeros(2, 1, 1, 6), "sine: must have the shape"),
        ("sine", torch.zeros(2, 1, 1, 8).bfloat16(), "sine: must be float32"),
        ("norm_weight", torch.zeros(1, 2, 16), "norm_weight: shape"),
        ("clip", 0.0, "clip: must be positive"),
        ("entries", torch.zeros(4, 1, 33), "entries: shape"),
        ("entries", torch.zeros(4, 1, 32).bfloat16(), "entries: must have the dtype"),
        ("write_slots", torch.tensor([0, 4]), "write_slots: slot 4"),
        ("write_slots", torch.tensor([0]), "write_slots: shape"),
        ("write_slots", torch.tensor([0, 1], dtype=torch.int32), "write_slots: must be int64"),
    ],
)
def test_grouped_heads_refuse(name: str, value: object, message: str) -> None:
    arguments: dict[str, object] = {
        "qkv": torch.zeros(2, 1, 4, 16),
        "cosine": torch.zeros(2, 1, 1, 8),
        "sine": torch.zeros(2, 1, 1, 8),
        "norm_weight": torch.ones(1, 3, 16),
        "norm_together": False,
        "norm_eps": 1e-6,
        "clip": 1.0,
        "entries": torch.zeros(4, 1, 32),
        "write_slots": torch.tensor([3, 1]),
    }
    native.prepare_grouped(runtime(LEVELS[-1], 1), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        native.prepare_grouped(
            runtime(LEVELS[-1], 1),
            **(arguments | {name: value}),  # type: ignore[arg-type]
        )
