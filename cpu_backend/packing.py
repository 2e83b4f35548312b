"""Weights in the packed form that the native kernels read (cpu_backend/csrc/packed.h).

A `PackedWeight` is one matrix [N, K]; `PackedExperts` holds the experts of a layer as one
contiguous, page-aligned record each: gate and up, down, biases. Both are filled in pieces, in any
order, so that a loader never holds more than a piece of the unpacked model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import ExpertSpec, ModelError
from moeserve.cpu_backend import _native
from moeserve.cpu_backend.activations import SWIGLU_CLAMPED

#: outputs of one panel (packed.h)
PANEL_OUTPUTS = 16
#: to be raised with every change of what packed.h, or a record of experts, means byte by byte:
#: what of an older version is still read: models/packed_model.py
LAYOUT_VERSION = 2
FormatName: TypeAlias = Literal["float32", "bfloat16", "int8", "int4", "mxfp4", "fp8"]
#: in the order of packed.h
FORMATS: tuple[FormatName, ...] = get_args(FormatName)
#: the activation that a name of config.json means, in the order of kernels.h
ACTIVATIONS: Mapping[str, int] = MappingProxyType(
    {
        "silu": 0,
        "swish": 0,
        "gelu": 1,
        "gelu_python": 1,
        "gelu_pytorch_tanh": 2,
        "gelu_python_tanh": 2,
        "gelu_new": 2,
        "gelu_fast": 2,
        "gelu_accurate": 2,
        "quick_gelu": 3,
        "relu": 4,
        SWIGLU_CLAMPED: 5,
    }
)

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class PackFormat:
    """How a matrix is stored, and what its inputs are multiplied as.

    name: of FORMATS. group: inputs under one scale (int4: 32, 64 or 128; elsewhere fixed).
    zero_points: int4 with a zero point per group, and with scales of their own; without, a group's
    scale is a whole multiple of its output's (packed.h). weight_only: inputs stay float; otherwise
    int8, int4 and mxfp4 weights meet inputs that are rounded to int8 with one scale per token.
    """

    name: FormatName
    group: int = 0
    zero_points: bool = False
    weight_only: bool = False

    @property
    def holds_codes(self) -> bool:
        """Whether it stores a checkpoint's own codes; numbers are not rounded to it here."""
        return self.name in ("mxfp4", "fp8")

    def describe(self) -> str:
        """For notes: int4/64+zeros, weight only."""
        group = f"/{self.group}" if self.name == "int4" else ""
        zeros = "+zeros" if self.zero_points else ""
        integers = self.name in ("int8", "int4", "mxfp4")
        return f"{self.name}{group}{zeros}{' weight-only' if self.weight_only and integers else ''}"

    def layout(self, rows: int, cols: int) -> _native.Layout:
        """The layout of [rows, cols]. Raises ModelError where the format cannot store it."""
        index = FORMATS.index(self.name)
        try:
            return _native.Layout(index, rows, cols, self.group, self.zero_points, self.weight_only)
        except ValueError as error:
            raise ModelError(f"{self.name}: {error}") from error


class PackedWeight:
    """One matrix [N, K]. `data` may be given: packed bytes that lie in a file, for one."""

    def __init__(
        self, runtime: _native.Runtime, shape: tuple[int, ...], form: PackFormat,
        data: Bytes | None = None,
    ) -> None:  # fmt: skip
        """shape: [..., K]; leading dimensions are numbered through as rows."""
        self.shape = shape
        self.form = form
        self.layout = form.layout(int(np.prod(shape[:-1], dtype=np.int64)), shape[-1])
        self.data = _native.allocate(self.layout.num_bytes) if data is None else data
        self.runtime = runtime

    @property
    def nbytes(self) -> int:
        return self.layout.num_bytes

    def put(self, rows: Tensor, piece: Tensor) -> None:
        """piece: [..., K] numbers, one row for each of `rows` (int64, any shape).

        Raises ModelError where a number that must be quantised is NaN or Inf.
        """
        flat = _exportable(piece.reshape(-1, self.shape[-1]))
        ids = rows.reshape(-1).numpy()
        if not _native.pack(self.runtime, self.layout, self.data, ids, flat):
            raise self._not_finite()

    def put_codes(self, rows: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Rows that are quantised already, in the checkpoint's own codes (`_native.pack_codes`).

        Raises ModelError where a code or a scale is NaN or Inf.
        """
        ids = rows.reshape(-1).numpy()
        flat = codes.reshape(ids.size, -1).view(torch.uint8)
        flat_scales = scales.reshape(ids.size, -1)
        if not _native.pack_codes(self.runtime, self.layout, self.data, ids, flat, flat_scales):
            raise self._not_finite()

    def _not_finite(self) -> ModelError:
        return ModelError(
            f"weights that are NaN or Inf cannot be stored as {self.form.name}",
            hint="the checkpoint is damaged; fetch it again",
        )

    def numbers(self) -> Tensor:
        """What is stored, as float32 [N, K]; for tests and reports."""
        out = torch.empty(self.layout.rows, self.layout.cols)
        _native.unpack(self.layout, self.data, out)
        return out


def _exportable(piece: Tensor) -> Tensor:
    """Rows in a dtype that the kernels read, contiguous within a row."""
    if piece.dtype is torch.float64:
        piece = piece.float()
    return piece if piece.stride(-1) == 1 or piece.shape[-1] == 1 else piece.contiguous()


class PackedExperts:
    """The experts of one MoE layer, or, as the one expert of its layer, a dense FFN.

    records: [E, record_bytes] uint8.
    """

    def __init__(
        self, runtime: _native.Runtime, spec: ExpertSpec, gate_up_form: PackFormat,
        down_form: PackFormat | None = None, records: Bytes | None = None,
    ) -> None:  # fmt: skip
        """down_form: None for that of gate and up. records: they may lie in a file, for one.

        Raises ModelError for an activation that the kernels do not have.
        """
        self.spec = spec
        self.gate_up_form = gate_up_form
        self.down_form = down_form = down_form or gate_up_form
        gate_up, down, self.native = _expert_layouts(spec, gate_up_form, down_form)
        self.gate_up_layout, self.down_layout = gate_up, down
        self.record_bytes: int = self.native.record_bytes
        self._gate_up_rows = _interleaved_rows(spec.intermediate_size)
        shape = (spec.num_experts, self.record_bytes)
        if records is None:
            records = _native.allocate(shape[0] * shape[1]).reshape(shape)
        self.records = records
        start = self.native.down_offset
        self._gate_up = [
            PackedWeight(runtime, (gate_up.rows, gate_up.cols), gate_up_form, record[:start])
            for record in records
        ]
        stop = start + down.num_bytes
        self._down = [
            PackedWeight(runtime, (down.rows, down.cols), down_form, record[start:stop])
            for record in records
        ]
        for expert, record in enumerate(records):
            self.native.set_record(expert, record)

    @staticmethod
    def bytes_of_record(spec: ExpertSpec, gate_up_form: PackFormat, down_form: PackFormat) -> int:
        """What one expert takes, in whole pages."""
        return _expert_layouts(spec, gate_up_form, down_form)[2].record_bytes

    def without_records(self) -> _native.PackedExperts:
        """The same experts, to be told by `set_record` where else their records stand."""
        return _expert_layouts(self.spec, self.gate_up_form, self.down_form)[2]

    @property
    def nbytes(self) -> int:
        return int(self.records.nbytes)

    def put_gate_up(self, expert: int, rows: Tensor, piece: Tensor) -> None:
        """piece: [R, H], rows [R] of (gate, then up) of one expert."""
        self._gate_up[expert].put(self._gate_up_rows[rows], piece)

    def put_down(self, expert: int, rows: Tensor, piece: Tensor) -> None:
        """piece: [R, I], rows [R] of one expert."""
        self._down[expert].put(rows, piece)

    def put_gate_up_codes(self, expert: int, rows: Tensor, codes: Tensor, scales: Tensor) -> None:
        self._gate_up[expert].put_codes(self._gate_up_rows[rows], codes, scales)

    def put_down_codes(self, expert: int, rows: Tensor, codes: Tensor, scales: Tensor) -> None:
        self._down[expert].put_codes(rows, codes, scales)

    def put_gate_up_bias(self, expert: int, rows: Tensor, values: Tensor) -> None:
        """values: [R] or [R, 1], rows [R] of (gate, then up) of one expert."""
        self._put_bias(self.native.gate_up_bias_offset, expert, self._gate_up_rows[rows], values)

    def put_down_bias(self, expert: int, rows: Tensor, values: Tensor) -> None:
        """values: [R] or [R, 1], rows [R] of one expert."""
        self._put_bias(self.native.down_bias_offset, expert, rows, values)

    def put_biases(self, gate_up: Tensor, down: Tensor) -> None:
        """gate_up: [E, 2I], down: [E, H]."""
        gate_up_rows, down_rows = torch.arange(gate_up.shape[1]), torch.arange(down.shape[1])
        for expert in range(self.spec.num_experts):
            self.put_gate_up_bias(expert, gate_up_rows, gate_up[expert])
            self.put_down_bias(expert, down_rows, down[expert])

    def _put_bias(self, offset: int, expert: int, rows: Tensor, values: Tensor) -> None:
        assert self.spec.bias, "a record without biases has no room for them"
        numbers = self.records[expert, offset:].view(np.float32)
        numbers[rows.numpy()] = values.float().reshape(-1).numpy()


def _interleaved_rows(intermediate_size: int) -> Tensor:
    """[2I]: where row i of (gate, then up) stands: panels of both take turns."""
    row = torch.arange(intermediate_size)
    gate = row // PANEL_OUTPUTS * (2 * PANEL_OUTPUTS) + row % PANEL_OUTPUTS
    return torch.cat((gate, gate + PANEL_OUTPUTS))


def _expert_layouts(
    spec: ExpertSpec, gate_up_form: PackFormat, down_form: PackFormat
) -> tuple[_native.Layout, _native.Layout, _native.PackedExperts]:
    """The layouts of both matrices of an expert, and the layer's experts without any record."""
    if spec.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ModelError(
            f"hidden_act: {spec.activation!r} is not one of {known}", field="hidden_act"
        )
    panels = -(-spec.intermediate_size // PANEL_OUTPUTS)
    gate_up = gate_up_form.layout(2 * panels * PANEL_OUTPUTS, spec.hidden_size)
    down = down_form.layout(spec.hidden_size, spec.intermediate_size)
    native = _native.PackedExperts(
        gate_up,
        down,
        spec.bias,
        ACTIVATIONS[spec.activation],
        spec.swiglu_alpha,
        spec.swiglu_limit,
        spec.num_experts,
    )
    return gate_up, down, native


def dense_format(dtype: torch.dtype) -> PackFormat:
    """The format that keeps numbers of a dtype as they are. ModelError: there is none."""
    names: dict[torch.dtype, FormatName] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
    }
    if dtype not in names:
        raise ModelError(
            f"dtype: the native backend keeps no {str(dtype).removeprefix('torch.')} weights",
            field="dtype",
            hint="choose --dtype bfloat16 or float32, or --cpu-backend torch",
        )
    return PackFormat(names[dtype])
