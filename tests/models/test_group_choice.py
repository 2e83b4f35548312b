"""The group of each int4 matrix follows from its numbers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.randomness import fresh_generators
from torch import Tensor

from moeserve.config import BUNDLED_MODEL, ExpertConfig, ModelConfig
from moeserve.core import ConfigError
from moeserve.cpu_backend.packing import PackFormat
from moeserve.models.group_choice import ALPHA, add_squares, finest_that_pays
from moeserve.models.registry import load_model
from moeserve.models.weight_formats import INT4_GROUPS, weight_formats
from moeserve.models.weight_map import Use, WeightRule


def squares_of(weight: Tensor, zero_points: bool = False) -> dict[int, float]:
    squares = dict.fromkeys(INT4_GROUPS, 0.0)
    add_squares(weight, zero_points, squares)
    return squares


@pytest.mark.parametrize("zero_points", [False, True])
def test_squares_of_ranges(zero_points: bool) -> None:
    """Against a loop over groups."""
    rng, generator = fresh_generators()
    weight = torch.randn(rng.randint(1, 9), 32 * rng.randint(1, 9), generator=generator)
    found = squares_of(weight, zero_points)
    for group in INT4_GROUPS:
        expected = 0.0
        for row in weight:
            for numbers in row.split(group):
                high, low = max(float(numbers.max()), 0), min(float(numbers.min()), 0)
                expected += group * (high - low if zero_points else 2 * max(high, -low)) ** 2
        assert found[group] == pytest.approx(expected, rel=1e-5)


def test_even_numbers_stay_coarse_and_outliers_make_groups_finer() -> None:
    _, generator = fresh_generators()
    even = torch.randn(64, 1024, generator=generator)
    assert finest_that_pays(1024, squares_of(even)) == 128
    spiked = even.clone()
    spiked[:, ::97] *= 20  # about one in every group of 128
    assert finest_that_pays(1024, squares_of(spiked)) == 32


def test_groups_never_pad_more_than_the_finest_ones() -> None:
    rng, generator = fresh_generators()
    for _ in range(30):
        cols = rng.randint(1, 600)
        squares = squares_of(torch.randn(20, cols, generator=generator))
        group = finest_that_pays(cols, squares)
        assert -(-cols // group) * group == -(-cols // 32) * 32
        if group > 32:
            assert squares[group // 2] >= ALPHA**2 * squares[group]


def test_matrices_of_a_model_choose_for_themselves(tmp_path: Path) -> None:
    """gate_up of one layer has outliers; its down, and the other layers, have not."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    for file in BUNDLED_MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() >= 2:
            tensors[name] = torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
        if "layers.3.mlp.experts" in name and "down" not in name:
            tensors[name][..., ::61] *= 20
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig(model=str(tmp_path), quantize="int4", quantize_group="auto")
    loaded = load_model(config, ExpertConfig(cpu_backend="native"))
    assert "gate and up: int4/32 (1), int4/64 (5); down: int4/64;" in loaded.notes["weights"]
    assert "head: int8;" in loaded.notes["weights"]


@pytest.mark.parametrize(("group", "expected"), [(64, 64), ("auto", 32)])
def test_a_head_of_four_bits(group: int | str, expected: int) -> None:
    """Beside an embedding that it shares there are no numbers of its own to choose a group by."""
    config = ModelConfig(quantize="int4", quantize_group=group, quantize_head="int4")
    head = weight_formats(config, torch.float32)(WeightRule("head", (8, 64), (), use=Use.HEAD))
    assert head == PackFormat("int4", expected)


def test_what_is_for_weights_of_four_bits_is_not_ignored_elsewhere() -> None:
    for quantize in ("none", "int8"):
        for name, value in (
            ("quantize_head", "int4"),
            ("quantize_group", 64),
            ("quantize_group", "auto"),
            ("quantize_zero_points", True),
        ):
            with pytest.raises(ConfigError, match=f"{name}: {value} is .* not {quantize}"):
                ModelConfig(quantize=quantize, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="quantize_head: 'fp8' is not one of"):
        ModelConfig(quantize="int4", quantize_head="fp8")


def test_other_groups_are_refused() -> None:
    for group in (16, "automatic", "32"):
        with pytest.raises(ConfigError, match="quantize_group"):
            ModelConfig(quantize_group=group)
