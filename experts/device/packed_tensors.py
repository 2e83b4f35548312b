"""Packed records of experts (cpu_backend/csrc/packed.h) as matrices of any device that torch has.

A record is the same bytes in every tier, so a slot on a device holds as many experts as host memory
of that size, and a copy is a copy. What torch multiplies is unpacked when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.cpu_backend import _native
from moeserve.cpu_backend.packing import FORMATS, PANEL_OUTPUTS, PackedExperts

#: values of e2m1, code by code (OCP Microscaling Formats v1.0, section 5.3.3)
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Unpacked:
    """n matrices [N, K]: values [n, N, K] in the dtype asked for, times scales [n, N] float32,
    None for 1. Scales of a whole output are kept apart: codes alone are exact in bfloat16."""

    values: Tensor
    scales: Tensor | None = None


class PackedMatrices:
    """One matrix of every record: where it stands there, and how it is read."""

    def __init__(
        self, layout: _native.Layout, offset: int, rows: int, interleaved: bool = False
    ) -> None:
        """offset: in a record. rows: of the matrix without padding, or of each of two that take
        turns panel by panel; those come out one below the other."""
        self._layout = layout
        self._offset = offset
        self._rows = rows
        self._turns = 2 if interleaved else 1
        self._format = FORMATS[layout.format]
        self._table: Tensor | None = None

    def unpack(self, records: Tensor, dtype: torch.dtype) -> Unpacked:
        """records: [n, bytes] uint8."""
        layout = self._layout
        stop = self._offset + layout.num_bytes
        panels = records[:, self._offset : stop].unflatten(1, (-1, layout.panel_bytes))
        values = self._values(panels, dtype)  # [n, P, 16, K]
        scales = self._output_scales(panels)  # [n, P, 16]
        return Unpacked(
            self._in_rows(values)[..., : layout.cols],
            None if scales is None else self._in_rows(scales),
        )

    def vectors(self, numbers: Tensor) -> Tensor:
        """numbers [n, P * 16], one for each packed row, as [n, N]."""
        return self._in_rows(numbers.unflatten(1, (-1, PANEL_OUTPUTS)))

    def _in_rows(self, panels: Tensor) -> Tensor:
        """[n, P, 16, ...] to [n, N, ...]."""
        # [n, turns, P / turns, 16, ...]
        by_turn: Tensor = panels.unflatten(1, (-1, self._turns)).transpose(1, 2)
        rows = by_turn.flatten(2, 3)[:, :, : self._rows]
        return rows.flatten(1, 2)

    def _values(self, panels: Tensor, dtype: torch.dtype) -> Tensor:
        body = panels[..., : self._layout.scale_offset]
        if self._format == "float32":
            return self._by_output(body.view(torch.float32), 1).to(dtype)
        if self._format == "bfloat16":
            return self._by_output(body.view(torch.bfloat16), 2).to(dtype)
        if self._format == "int8":
            return self._by_output(body, 4).to(dtype) - 128
        if self._format == "fp8":
            # Stored scales are 2^8 too large, because kernels read codes as float16 (pack.cpp).
            codes = body.view(torch.float8_e4m3fn).to(torch.float32) / 256
            chunks = codes.unflatten(-1, (-1, 4, PANEL_OUTPUTS))  # [n, P, C, 4, 16]
            values = chunks.movedim(-1, 2).flatten(-2)
            return self._times(values, self._scales(panels, torch.float32)).to(dtype)
        nibbles = self._nibbles(body)
        if self._format == "mxfp4":
            values = self._fp4_table(body.device)[nibbles.int()]
            return self._times(values, self._scales(panels, torch.bfloat16).float()).to(dtype)
        codes = nibbles.to(torch.int8)
        layout = self._layout
        if not layout.asymmetric:
            factors = panels[..., layout.factor_offset : layout.zero_offset].view(torch.int8)
            return self._times(codes - 8, self._by_group(factors)).to(dtype)
        stop = layout.zero_offset + layout.num_groups * PANEL_OUTPUTS
        zeros = self._by_group(panels[..., layout.zero_offset : stop]).to(torch.int8)
        values = codes.unflatten(-1, (layout.num_groups, -1)) - zeros.unsqueeze(-1)
        scales = self._scales(panels, torch.bfloat16).float()
        numbers: Tensor = (values * scales.unsqueeze(-1)).flatten(-2).to(dtype)
        return numbers

    def _fp4_table(self, device: torch.device) -> Tensor:
        """[16], brought to the device once: each time would wait for all that it has to do."""
        if self._table is None or self._table.device != device:
            values = [*FP4_VALUES, *(-value for value in FP4_VALUES)]
            self._table = torch.tensor(values, device=device)
        return self._table

    def _output_scales(self, panels: Tensor) -> Tensor | None:
        """[n, P, 16], where a format has one scale for all inputs of an output."""
        layout = self._layout
        whole = self._format == "int8" or (self._format == "int4" and not layout.asymmetric)
        if not whole:
            return None
        stop = layout.scale_offset + 4 * PANEL_OUTPUTS
        return panels[..., layout.scale_offset : stop].view(torch.float32)

    def _scales(self, panels: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, P, 16, groups]."""
        layout = self._layout
        num_bytes = layout.num_groups * PANEL_OUTPUTS * dtype.itemsize
        stored = panels[..., layout.scale_offset : layout.scale_offset + num_bytes]
        return self._by_group(stored.view(dtype))

    @staticmethod
    def _by_output(body: Tensor, chunk_inputs: int) -> Tensor:
        """[n, P, C * 16 * inputs] to [n, P, 16, C * inputs]."""
        chunks: Tensor = body.unflatten(-1, (-1, PANEL_OUTPUTS, chunk_inputs))
        return chunks.movedim(2, 3).flatten(-2)

    @staticmethod
    def _nibbles(body: Tensor) -> Tensor:
        """[n, P, C * 64] bytes to the codes [n, P, 16, C * 8]: byte b of an output's four holds its
        input b below, and 4 + b above."""
        chunks = body.unflatten(-1, (-1, PANEL_OUTPUTS, 4)).movedim(2, 3)  # [n, P, 16, C, 4]
        return torch.stack((chunks & 15, chunks >> 4), dim=-2).flatten(-3)

    @staticmethod
    def _by_group(stored: Tensor) -> Tensor:
        """[n, P, groups * 16] to [n, P, 16, groups]."""
        groups: Tensor = stored.unflatten(-1, (-1, PANEL_OUTPUTS)).transpose(-1, -2)
        return groups

    @staticmethod
    def _times(values: Tensor, by_group: Tensor) -> Tensor:
        """values [n, P, 16, K] times by_group [n, P, 16, groups]."""
        grouped: Tensor = values.unflatten(-1, (by_group.shape[-1], -1))
        return (grouped * by_group.unsqueeze(-1)).flatten(-2)


def matrices_of(experts: PackedExperts) -> tuple[PackedMatrices, PackedMatrices]:
    """Gate above up, [2I, H], and down, [H, I], of a layer's records."""
    spec = experts.spec
    gate_up = PackedMatrices(experts.gate_up_layout, 0, spec.intermediate_size, interleaved=True)
    down = PackedMatrices(experts.down_layout, experts.native.down_offset, spec.hidden_size)
    return gate_up, down
