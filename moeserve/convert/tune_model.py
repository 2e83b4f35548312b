"""A converted model as it is tuned, and the dense one beside it: layers that know derivatives.

The engine's own layers write into their inputs and into a kv pool, which no derivative survives.
Attention, norms and vocabulary are the dense model's and stand still, so both models share them.
All weights are in memory in float32, other than in a conversion without tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve.convert.dense import CPU, EMBEDDING, DenseModel
from moeserve.convert.run_layers import DenseFfn
from moeserve.convert.settings import MoeShape
from moeserve.convert.tune_ffn import CutFfn, TunedFfn, Worked
from moeserve.cpu_backend.activations import elementwise_activation
from moeserve.models.inputs import ForwardBatch
from moeserve.models.rope import Rope
from moeserve.models.safetensors_file import SafetensorsFile
from moeserve.models.spec import AttentionSpec
from moeserve.models.targets import Weight

#: logits that are held at once
HEAD_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Turns:
    """Cosine and signed sine of a window's positions, each [W, 1, D]."""

    cosine: Tensor
    sine: Tensor

    @staticmethod
    def of(spec: AttentionSpec, window_tokens: int) -> Turns:
        positions = torch.arange(window_tokens)
        batch = ForwardBatch(positions, positions, positions, (), 0)
        cosine, sine = Rope(spec.rope, CPU).turns(batch)
        return Turns(cosine[:, 0], sine[:, 0])

    def __call__(self, x: Tensor) -> Tensor:
        """[B, W, heads, D]."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cosine + torch.cat((second, first), dim=-1) * self.sine


class FrozenLayer:
    """Attention and norms of a layer, and the dense FFN."""

    def __init__(self, model: DenseModel, index: int) -> None:
        weights = {name: _tensor(weight) for name, weight in model.layer(index).items()}
        self._spec = model.attention
        self._eps = model.spec.norm_eps
        self._weights = weights
        gate, up = weights["ffn.gate_up.weight"].chunk(2)
        self.dense_ffn = DenseFfn(gate, up, weights["ffn.down.weight"], model.ffn.activation)

    def attend(self, x: Tensor, turns: Turns) -> tuple[Tensor, Tensor]:
        """x: [B, W, H]. The stream after attention, and its norm for the FFN."""
        weights, spec = self._weights, self._spec
        group, dim = spec.heads_per_kv_head, spec.head_dim
        normed = self._norm(x, weights["attention_norm"])
        bias = weights.get("qkv.bias")
        qkv = F.linear(
            normed, weights["qkv.weight"].flatten(0, 2), None if bias is None else bias.flatten()
        )
        qkv = qkv.view(*x.shape[:2], spec.num_kv_heads, group + 2, dim)
        query, key, value = qkv.split((group, 1, 1), dim=3)
        if "qk_norm" in weights:
            query_norm, key_norm = weights["qk_norm"]
            query, key = self._norm(query, query_norm), self._norm(key, key_norm)
        mixed = F.scaled_dot_product_attention(
            turns(query.flatten(2, 3)).transpose(1, 2),
            turns(key.flatten(2, 3)).transpose(1, 2),
            value.flatten(2, 3).transpose(1, 2),
            is_causal=True,
            scale=spec.scale,
            enable_gqa=True,
        )
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), weights["output.weight"])
        return x, self._norm(x, weights["ffn_norm"])

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._eps)


class TunedModel:
    """Both models over windows of tokens."""

    def __init__(
        self,
        model: DenseModel,
        shape: MoeShape,
        shards: Sequence[Path],
        always_on: Sequence[int],
        window_tokens: int,
        seed: int,
    ) -> None:
        """shards: of the layers, as they were converted. always_on: by layer, routed experts that
        every token chooses. Raises ModelError."""
        generator = torch.Generator().manual_seed(seed)
        activation = elementwise_activation(model.ffn.activation)
        self.layers = [FrozenLayer(model, index) for index in range(len(shards))]
        self.ffns = []
        for index, shard in enumerate(shards):
            written = CutFfn.read(SafetensorsFile(shard), index, shape, always_on[index])
            num_active = shape.num_shared + shape.top_k
            self.ffns.append(TunedFfn(written, num_active, activation, generator))
        self._turns = Turns.of(model.attention, window_tokens)
        self._embedding = _read(model, EMBEDDING)
        tied = model.head_name == EMBEDDING
        self._head = self._embedding if tied else _read(model, model.head_name)
        self._norm = model.end("norm").clone()
        self._eps = model.spec.norm_eps

    def parameters(self) -> dict[str, Tensor]:
        return {
            f"layers.{index}.{name}": parameter
            for index, ffn in enumerate(self.ffns)
            for name, parameter in ffn.parameters.items()
        }

    @torch.no_grad()
    def dense(self, token_ids: Tensor) -> Tensor:
        """[B, W] to the dense model's stream after the last layer [B, W, H]."""
        x = F.embedding(token_ids, self._embedding)
        for layer in self.layers:
            x, normed = layer.attend(x, self._turns)
            ffn = layer.dense_ffn
            x = x + ffn.activations(normed.flatten(0, 1)).view(*x.shape[:2], -1) @ ffn.down.T
        return x

    def tuned(self, token_ids: Tensor) -> tuple[Tensor, list[Worked], list[Tensor]]:
        """[B, W] to the tuned model's stream after the last layer [B, W, H]; what every FFN did,
        and its inputs [B * W, H]."""
        x = F.embedding(token_ids, self._embedding)
        done, inputs = [], []
        for layer, ffn in zip(self.layers, self.ffns, strict=True):
            x, normed = layer.attend(x, self._turns)
            inputs.append(normed.flatten(0, 1))
            done.append(ffn(inputs[-1]))
            x = x + done[-1].output.view_as(x)
        return x, done, inputs

    def divergence(self, dense: Tensor, tuned: Tensor) -> tuple[float, Tensor]:
        """Of streams [B, W, H]: the Kullback-Leibler divergence of the tuned model's next tokens
        from the dense model's, nats per token, and its gradient by the tuned stream."""
        rows, hidden = dense.numel() // dense.shape[-1], dense.shape[-1]
        leaf = tuned.detach().reshape(rows, hidden).requires_grad_()
        total = 0.0
        with torch.enable_grad():
            # Piece by piece, because logits of a large vocabulary are larger than the model.
            for part in torch.arange(rows).split(max(1, HEAD_NUMBERS // len(self._head))):
                wanted = self._log_probabilities(dense.reshape(rows, hidden)[part])
                found = self._log_probabilities(leaf[part])
                loss = F.kl_div(found, wanted, reduction="sum", log_target=True) / rows
                torch.autograd.backward(loss)
                total += float(loss.detach())
        assert leaf.grad is not None, "every row had its part"
        return total, leaf.grad.view_as(tuned)

    def _log_probabilities(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, self._norm.shape, self._norm, self._eps)
        return (normed @ self._head.T).log_softmax(-1)


def _tensor(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor), "dense models have plain weights"
    return weight


def _read(model: DenseModel, name: str) -> Tensor:
    found = model.checkpoint.read(name).to(torch.float32, copy=True)
    model.checkpoint.release(name)
    return found
