"""Runs single layers of a dense model over windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeserve.config import ExpertConfig
from moeserve.convert.dense import CPU, DenseModel
from moeserve.cpu_backend.activations import elementwise_activation
from moeserve.experts.build_runtime import build_expert_runtime
from moeserve.models.attention import Attention
from moeserve.models.attention_plan import TorchAttention
from moeserve.models.builder import build_layer
from moeserve.models.inputs import ForwardBatch, Span
from moeserve.models.kv_pool import KvPool
from moeserve.models.rope import Rope
from moeserve.models.spec import ModelSpec
from moeserve.models.step_context import AttentionLayout, StepContext

#: tokens that go through a product together
STEP_TOKENS = 4096
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class DenseFfn:
    """One FFN in float32: gate and up [I, H], down [H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor
    activation_name: str

    def activations(self, normed: Tensor) -> Tensor:
        """[T, H] -> [T, I]: what `down` is multiplied with."""
        activation = elementwise_activation(self.activation_name)
        out = normed.new_empty(len(normed), len(self.gate))
        for start in range(0, len(normed), STEP_TOKENS):
            rows = normed[start : start + STEP_TOKENS]
            part = out[start : start + STEP_TOKENS]
            torch.mul(activation(rows @ self.gate.T), rows @ self.up.T, out=part)
        return out


class WindowSteps:
    """Steps of whole windows of tokens, each from its first token, through one layer."""

    def __init__(self, spec: ModelSpec, attention: Attention, window_tokens: int) -> None:
        """spec: with this layer alone."""
        rope = attention.spec.rope
        self._ropes = {rope: Rope(rope, CPU)}
        self._layouts: set[AttentionLayout] = {attention.layout}
        self._window_tokens = window_tokens
        self._together = max(1, STEP_TOKENS // window_tokens)
        blocks = -(-self._together * window_tokens // BLOCK_TOKENS)
        self._kv = KvPool(spec, blocks, BLOCK_TOKENS, torch.float32, CPU)
        self.kv = self._kv.layers[0]

    def of(self, num_rows: int) -> Iterator[tuple[slice, StepContext]]:
        """num_rows: of whole windows. The rows of each step."""
        size = self._together * self._window_tokens
        for start in range(0, num_rows, size):
            rows = slice(start, min(start + size, num_rows))
            yield rows, self._context(rows.stop - rows.start)

    def _context(self, num_rows: int) -> StepContext:
        length = self._window_tokens
        count = num_rows // length
        slots = torch.arange(num_rows).view(count, length)
        spans = tuple(
            Span(number * length, (number + 1) * length, length, own, length)
            for number, own in enumerate(slots)
        )
        batch = ForwardBatch(
            token_ids=torch.zeros(num_rows, dtype=torch.int64),
            positions=torch.arange(length).repeat(count),
            kv_write_slots=slots.flatten(),
            spans=spans,
            step=0,
        )
        plan = TorchAttention.plan
        return StepContext.build(batch, self._kv, self._ropes, self._layouts, plan, torch.float32)


class LayerRunner:
    """One layer, loaded: its attention for windows of tokens, and its FFN."""

    def __init__(self, model: DenseModel, index: int, window_tokens: int) -> None:
        spec = replace(model.spec, layers=(model.spec.layers[index],))
        weights = model.layer(index)
        runtime = build_expert_runtime(ExpertConfig(cpu_backend="torch"), {}, CPU, torch.float32)
        self._layer = build_layer(spec, 0, spec.layers[0], weights, runtime)
        attention = self._layer.attention
        assert isinstance(attention, Attention), "checked when the model was opened"
        self._attention = attention
        self._steps = WindowSteps(spec, attention, window_tokens)
        gate_up, down = weights["ffn.gate_up.weight"], weights["ffn.down.weight"]
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        gate, up = gate_up.chunk(2)
        self.ffn = DenseFfn(gate, up, down, model.ffn.activation)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, H], whole windows. The stream after attention and its norm, both [T, H]."""
        after, normed = torch.empty_like(x), torch.empty_like(x)
        layer = self._layer
        for rows, step in self._steps.of(len(x)):
            part = x[rows]
            after[rows] = part + self._attention(layer.attention_norm(part), step, self._steps.kv)
            normed[rows] = layer.ffn_norm(after[rows])
        return after, normed


def product(activations: Tensor, down: Tensor) -> Tensor:
    """[T, I], [H, I] -> [T, H]."""
    return torch.cat([rows @ down.T for rows in activations.split(STEP_TOKENS)])
