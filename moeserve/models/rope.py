"""Rotary position embedding: frequencies of every kind, and the rotation itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moeserve.cpu_backend import _native
from moeserve.models.inputs import ForwardBatch
from moeserve.models.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeSpec,
    YarnScaling,
)


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """Radians per position of each pair of dimensions: [dim/2] float32.

    With LongRoPE those of sequences up to the original context.
    """
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    frequencies = 1.0 / rope.theta**exponents
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(frequencies, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(frequencies, rope, scaling)
    if isinstance(scaling, LongRopeScaling):
        return long_rope_frequencies(rope, scaling.short_factors)
    return frequencies


def long_rope_frequencies(rope: RopeSpec, factors: Sequence[float]) -> Tensor:
    """factors: [dim/2] -> [dim/2] float32, in the order of operations of transformers."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponents)


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
        self._frequencies = inverse_frequencies(spec)[None].to(device)  # [1, dim / 2]
        self._turns = turns_on_cpu if device.type == "cpu" else turns_on_device
        scaling, self._amplitude = spec.scaling, 1.0
        self._short_tokens: int | None = None  # longer sequences turn by the frequencies below
        self._long_frequencies = self._frequencies
        if isinstance(scaling, YarnScaling | LongRopeScaling):
            self._amplitude = scaling.attention_factor
        if isinstance(scaling, LongRopeScaling):
            self._short_tokens = scaling.original_context_tokens
            long = long_rope_frequencies(spec, scaling.long_factors)
            self._long_frequencies = long[None].to(device)

    def turns(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine of the batch's positions, each [T, 1, 1, dim] float32: the sine
        is negative in the first half, towards which rotate() turns the second.

        Angles are float32 products, as everywhere. Their cosines are taken in float64, whose last
        bits are lost: in float32 they depend on where in a vector register a number stands, which
        is to say on the number of rows.
        """
        return self._turns(batch.positions, self._frequencies_of(batch), self._amplitude)

    def _frequencies_of(self, batch: ForwardBatch) -> Tensor:
        """[1, dim / 2], or [T, dim / 2] where rows turn unlike."""
        if self._short_tokens is None:
            return self._frequencies
        frequencies = self._frequencies.repeat(len(batch.positions), 1)
        for span in batch.spans:
            if span.sequence_tokens > self._short_tokens:
                frequencies[span.start : span.stop] = self._long_frequencies
        return frequencies


def turns_on_cpu(positions: Tensor, frequencies: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    """In one native call: ten operators of torch are a hundredth of a decode step."""
    turns = torch.empty(2, len(positions), 1, 1, 2 * frequencies.shape[1])
    cosine, sine = turns.unbind()
    _native.turn_positions(positions, frequencies, amplitude, cosine, sine)
    return cosine, sine


def turns_on_device(
    positions: Tensor, frequencies: Tensor, amplitude: float
) -> tuple[Tensor, Tensor]:
    angles = (positions[:, None].float() * frequencies)[:, None, None].double()
    cosine, sine = angles.cos().float() * amplitude, angles.sin().float() * amplitude
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)


def rotate_(x: Tensor, turns: tuple[Tensor, Tensor]) -> None:
    """Turns [..., dim] in place; the two factors broadcast against it.

    (a, b) -> (a cos - b sin, b cos + a sin), where b is the second half of the dimensions. The
    factors are float32, so that a bf16 vector is rounded once per product and not before.
    """
    cosine, signed_sine = turns
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    x.mul_(cosine).addcmul_(swapped, signed_sine)
