"""Cosines and sines of positions: the native call beside torch's operators."""

from __future__ import annotations

import pytest
import torch

from moeserve.cpu_backend import _native
from moeserve.models.rope import turns_on_cpu, turns_on_device


@pytest.mark.parametrize("num_rows", [0, 1, 7, 300])
def test_native_turns_are_those_of_torch(num_rows: int, seed: int) -> None:
    """Both round cosines of doubles: floats differ, if at all, by one last bit."""
    generator = torch.Generator().manual_seed(seed)
    for half in (1, 3, 64):
        positions = torch.randint(1 << 17, (num_rows,), generator=generator)
        for own in {1, num_rows}:
            frequencies = torch.rand(own, half, generator=generator) ** 3
            ours = turns_on_cpu(positions, frequencies, 1.25)
            expected = turns_on_device(positions, frequencies, 1.25)
            for found, wanted in zip(ours, expected, strict=True):
                assert found.shape == wanted.shape == (num_rows, 1, 1, 2 * half)
                torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0)


def test_a_row_turns_alike_among_any_others(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(1 << 17, (65,), generator=generator)
    frequencies = torch.rand(1, 32, generator=generator)
    together = turns_on_cpu(positions, frequencies, 1.0)
    for row in range(65):
        alone = turns_on_cpu(positions[row : row + 1], frequencies, 1.0)
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_rows[row])


def test_turns_that_do_not_fit_are_refused() -> None:
    positions, frequencies = torch.arange(3), torch.ones(1, 4)
    good = torch.empty(3, 1, 1, 8)
    _native.turn_positions(positions, frequencies, 1.0, good, good.clone())
    for name, call in {
        "frequencies": (positions, torch.ones(2, 4), 1.0, good, good),
        "positions": (positions - 1, frequencies, 1.0, good, good),
        "cosine": (positions, torch.ones(1, 3), 1.0, good, good),
        "sine": (positions, frequencies, 1.0, good, torch.empty(2, 1, 1, 8)),
    }.items():
        with pytest.raises(ValueError, match=name):
            _native.turn_positions(*call)
