"""What experts refuse, each with the argument's name."""

from __future__ import annotations

import pytest
import torch
from support.native_arguments import Settings, bytes_of
from support.native_matrices import runtime
from torch import Tensor

from moeserve.cpu_backend import _native as native

GATE_UP, DOWN = (0, 64, 10), (0, 10, 20)


@pytest.mark.parametrize(
    ("gate_up", "down", "activation", "message"),
    [
        ((0, 48, 10), DOWN, 0, "gate_up: its shape does not fit"),
        ((0, 96, 10), DOWN, 0, "gate_up: its shape does not fit"),
        ((0, 64, 11), DOWN, 0, "gate_up: its shape does not fit"),
        (GATE_UP, (0, 10, 33), 0, "gate_up: its shape does not fit"),
        (GATE_UP, (0, 10, 16), 0, "gate_up: its shape does not fit"),
        (GATE_UP, DOWN, 6, "activation: 6 is none"),
        (GATE_UP, DOWN, -1, "activation: -1 is none"),
    ],
)
def test_expert_shapes(gate_up: Settings, down: Settings, activation: int, message: str) -> None:
    layouts = native.Layout(*gate_up), native.Layout(*down)
    with pytest.raises(ValueError, match=message):
        native.PackedExperts(*layouts, False, activation, 0.0, 0.0, 4)


def experts_of(count: int) -> native.PackedExperts:
    layouts = native.Layout(*GATE_UP), native.Layout(*DOWN)
    return native.PackedExperts(*layouts, True, 0, 0.0, 0.0, count)


def test_number_of_experts() -> None:
    for count in (0, -1):
        with pytest.raises(ValueError, match="num_experts: must be at least 1"):
            experts_of(count)


def two_experts(records: int = 2) -> native.PackedExperts:
    experts = experts_of(2)
    for expert in range(records):
        experts.set_record(expert, native.allocate(experts.record_bytes))
    return experts


def test_records() -> None:
    experts = two_experts()
    size = experts.record_bytes
    assert (size % 4096, experts.down_offset) == (0, native.Layout(*GATE_UP).num_bytes)
    for expert in (-1, 2):
        with pytest.raises(ValueError, match=f"expert: {expert} is out of range"):
            experts.set_record(expert, bytes_of(size))
    for record, message in (
        (bytes_of(size - 1), "record: shape"),
        (bytes_of(size).char(), "record: must be uint8"),
        (bytes_of(2 * size)[::2], "record: is not contiguous"),
        (bytes_of(size + 1)[1:], "record: its address is no multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            experts.set_record(0, record)


TOKENS = torch.zeros(3, 10)
CHOICES = torch.zeros(3, 2, dtype=torch.int64)
FACTORS = torch.zeros(3, 2)
WANTED = torch.ones(2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TOKENS.double(), CHOICES, FACTORS, None, TOKENS), "x: must be float32"),
        ((TOKENS[:, :9], CHOICES, FACTORS, None, TOKENS), r"x: shape \[3, 9\]"),
        ((TOKENS, CHOICES.int(), FACTORS, None, TOKENS), "ids: must be int64"),
        ((TOKENS, CHOICES[:2], FACTORS, None, TOKENS), r"ids: shape \[2, 2\]"),
        ((TOKENS, CHOICES[:, 0].clone(), FACTORS, None, TOKENS), r"ids: shape \[3\]"),
        ((TOKENS, CHOICES[:, :1], FACTORS, None, TOKENS), "ids: is not contiguous"),
        ((TOKENS, CHOICES, FACTORS.double(), None, TOKENS), "weights: must be float32"),
        ((TOKENS, CHOICES, FACTORS[:, :1], None, TOKENS), "weights: is not contiguous"),
        ((TOKENS, CHOICES, FACTORS[:, :1].clone(), None, TOKENS), r"weights: shape \[3, 1\]"),
        ((TOKENS, CHOICES, FACTORS, WANTED.bool(), TOKENS), "wanted: must be uint8"),
        ((TOKENS, CHOICES, FACTORS, WANTED[:1], TOKENS), r"wanted: shape \[1\], expected \[2\]"),
        ((TOKENS, CHOICES, FACTORS, WANTED.repeat(2)[::2], TOKENS), "wanted: is not contiguous"),
        ((TOKENS, CHOICES + 2, FACTORS, None, TOKENS), r"ids: 2 is not within 0..1"),
        ((TOKENS, CHOICES - 1, FACTORS, None, TOKENS), r"ids: -1 is not within 0..1"),
        ((TOKENS, CHOICES, FACTORS, None, TOKENS.double()), "out: must be float32"),
        ((TOKENS, CHOICES, FACTORS, None, TOKENS[:2]), r"out: shape \[2, 10\]"),
        ((TOKENS, CHOICES, FACTORS, None, torch.zeros(3, 20)[:, :10]), "out: is not contiguous"),
    ],
)
def test_expert_jobs(
    arguments: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor], message: str
) -> None:
    experts = two_experts()
    for call in (experts.run, experts.submit):
        with pytest.raises(ValueError, match=message):
            call(runtime("scalar"), *arguments)


def test_an_expert_without_a_record() -> None:
    experts, out = two_experts(records=1), torch.ones(3, 10)
    with pytest.raises(ValueError, match="ids: expert 1 has no record"):
        experts.run(runtime("scalar"), TOKENS, CHOICES + 1, FACTORS, None, out)
    only_the_first = torch.tensor([1, 0], dtype=torch.uint8)
    experts.run(runtime("scalar"), TOKENS, CHOICES + 1, FACTORS, only_the_first, out)
    assert not out.any()
