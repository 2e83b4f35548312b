"""Rotary position embedding: frequencies of every kind, and the rotation itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeserve.models.spec import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """Radians per position of each pair of dimensions: [dim/2] float32."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    frequencies = 1.0 / rope.theta**exponents
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(frequencies, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(frequencies, rope, scaling)
    return frequencies


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Long waves slowed by `factor`, short ones kept, linear in the wave number in between."""
    turns = scaling.original_context_tokens * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(frequencies: Tensor, rope: RopeSpec, scaling: YarnScaling) -> Tensor:
    """Interpolates the dimensions that turn less than beta_slow times in the original context,
    keeps those that turn more than beta_fast times, with a linear ramp between both bounds."""

    def dimension_with(turns: float) -> float:
        wave = scaling.original_context_tokens / (turns * 2 * math.pi)
        return rope.dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = dimension_with(scaling.beta_fast), dimension_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    pairs = torch.arange(rope.dim // 2, dtype=torch.float32)
    interpolated = ((pairs - low) / (high - low)).clamp(0, 1)
    return frequencies * (interpolated / scaling.factor + (1 - interpolated))


class Rope:
    """Cosines and sines of positions, made once per step and used by all layers."""

    def __init__(self, spec: RopeSpec, device: torch.device) -> None:
        frequencies = inverse_frequencies(spec).to(device)
        self._frequencies = torch.cat((frequencies, frequencies))  # [dim]
        # rotate() turns the second half towards the first, hence the sign of the first.
        self._sine_sign = torch.ones(spec.dim, device=device)
        self._sine_sign[: spec.dim // 2] = -1
        scaling = spec.scaling
        self._amplitude = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [T] -> cosine and signed sine, each [T, 1, 1, dim] float32.

        Angles are float32 products, as everywhere. Their cosines are taken in float64, whose last
        bits are lost: in float32 they depend on where in a vector register a number stands, which
        is to say on the number of rows.
        """
        angles = (positions[:, None].float() * self._frequencies)[:, None, None].double()
        cosine, sine = angles.cos().float(), angles.sin().float()
        return cosine * self._amplitude, sine * (self._sine_sign * self._amplitude)


def rotate_(x: Tensor, turns: tuple[Tensor, Tensor]) -> None:
    """Turns [..., dim] in place; the two factors broadcast against it.

    (a, b) -> (a cos - b sin, b cos + a sin), where b is the second half of the dimensions. The
    factors are float32, so that a bf16 vector is rounded once per product and not before.
    """
    cosine, signed_sine = turns
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    x.mul_(cosine).addcmul_(swapped, signed_sine)
