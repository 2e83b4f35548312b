"""Runs a converted model over text, layer by layer from the files that were just written.

What its routers choose is what pregate learns from. The model is read as anybody else would read
it, but one layer at a time, in float32; nothing of the layers before stays but the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve.config import ExpertConfig
from moeserve.convert.dense import CPU, EMBEDDING
from moeserve.convert.run_layers import WindowSteps
from moeserve.core import ExpertSpec, Routing
from moeserve.cpu_backend.activations import elementwise_activation
from moeserve.experts.build_runtime import build_expert_runtime
from moeserve.experts.router import Routes
from moeserve.models.attention import Attention
from moeserve.models.builder import build_layer
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.families import FAMILIES
from moeserve.models.gates import gate_of
from moeserve.models.loader import load_weights
from moeserve.models.safetensors_file import SafetensorsFile
from moeserve.models.spec import ModelSpec
from moeserve.models.targets import Weight
from moeserve.models.transformer import MoeFfn
from moeserve.models.weight_map import WeightRule
from moeserve.predictors.gates import LayerGate

#: the router of a layer, by its index, to what routes instead
Reroute = Callable[[int, Routes], Routes]


@dataclass(frozen=True)
class WrittenModel:
    """The shards of a conversion, which has no index yet."""

    spec: ModelSpec
    checkpoint: Checkpoint
    rules: Sequence[WeightRule]

    @staticmethod
    @contextmanager
    def open(
        path: Path, config: Mapping[str, Any], shards: Sequence[Path]
    ) -> Iterator[WrittenModel]:
        """config: what config.json will say. Raises ModelError."""
        family = FAMILIES[config["model_type"]]
        spec = family.spec(config, str(path))
        checkpoint = Checkpoint(path, [SafetensorsFile(shard) for shard in shards])
        try:
            rules = family.weight_rules(spec, checkpoint.names(), torch.float32)
            yield WrittenModel(spec, checkpoint, rules)
        finally:
            checkpoint.close()

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] to [T, H] float32."""
        states = F.embedding(token_ids, self.checkpoint.read(EMBEDDING)).float()
        self.checkpoint.release(EMBEDDING)
        return states

    def run_layer(
        self, index: int, x: Tensor, window_tokens: int, reroute: Reroute | None = None
    ) -> LayerRun:
        """x: [T, H], whole windows; becomes the stream after the layer."""
        weights = self._load(index)
        experts = {index: self.spec.moe_layers[index].experts}
        config = ExpertConfig(cpu_backend="torch")
        runtime = build_expert_runtime(config, experts, CPU, torch.float32)
        layer = build_layer(self.spec, index, self.spec.layers[index], weights, runtime)
        ffn, attention = layer.ffn, layer.attention
        assert isinstance(ffn, MoeFfn), "every layer of a conversion has experts"
        assert isinstance(attention, Attention), "glm4_moe has grouped attention"
        assert ffn.shared is not None, "every layer of a conversion has a shared expert"
        router = ffn.routed.router
        routes = router if reroute is None else reroute(index, router)
        spec = replace(self.spec, layers=(self.spec.layers[index],))
        steps = WindowSteps(spec, attention, window_tokens)
        choices = []
        for rows, step in steps.of(len(x)):
            part = x[rows] + attention(layer.attention_norm(x[rows]), step, steps.kv)
            normed = layer.ffn_norm(part)
            routing = routes(normed)
            choices.append(routing.ids.to(torch.int16))
            x[rows] = part + ffn.shared(normed) + _routed(weights, experts[index], normed, routing)
        runtime.close()
        return LayerRun(gate_of(index, layer), torch.cat(choices))

    def _load(self, index: int) -> dict[str, Weight]:
        prefix = f"layers.{index}."
        rules = [rule for rule in self.rules if rule.target.startswith(prefix)]
        loaded = load_weights(
            self.checkpoint, rules, ignore=(".*",), dtype=torch.float32, device=CPU
        )
        return {name.removeprefix(prefix): weight for name, weight in loaded.items()}


def _routed(
    weights: Mapping[str, Weight], spec: ExpertSpec, normed: Tensor, routing: Routing
) -> Tensor:
    """[T, H]: all experts on all rows, most of it times zero.

    Rows gathered by expert would be another number every time, and oneDNN keeps something for
    every shape that it has seen: 4 to 10 MB a layer, where one layer was to be held at a time.
    """
    gate_ups, downs = weights["experts.gate_up"], weights["experts.down"]
    assert isinstance(gate_ups, Tensor)
    assert isinstance(downs, Tensor)
    activation = elementwise_activation(spec.activation)
    weight = normed.new_zeros(len(normed), len(downs)).scatter_(1, routing.ids, routing.weights)
    y = torch.zeros_like(normed)
    for expert, (gate_up, down) in enumerate(zip(gate_ups, downs, strict=True)):
        gate, up = (normed @ half.T for half in gate_up.chunk(2))
        y += (activation(gate) * up * weight[:, expert, None]) @ down.T
    return y


@dataclass(frozen=True)
class LayerRun:
    """What a layer was and did. choices: [T, K] int16 expert ids."""

    gate: LayerGate
    choices: Tensor
