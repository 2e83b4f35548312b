"""A converted layer: what it computes, and its tensors for the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.convert.glm import Gate, layer_names, router_spec
from moeserve.convert.methods import Split
from moeserve.convert.run_layers import DenseFfn, product
from moeserve.convert.settings import MoeShape
from moeserve.convert.shards import Source
from moeserve.experts.router import Router, RouterWeights
from moeserve.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class ConvertedLayer:
    """What is written of a layer. down: [H, I] in the dtype of the checkpoint, where it is fitted
    anew; None: the dense model's own."""

    shape: MoeShape
    split: Split
    gate: Gate
    down: Tensor | None

    def weights(self, normed: Tensor) -> Tensor:
        """[T, I]: with what each neuron works on each token, by the router that is written."""
        spec = router_spec(self.shape, normed.shape[1])
        gate = RouterWeights(self.gate.weight.float(), None, self.gate.correction)
        routing = Router(spec, gate)(normed)
        chosen = torch.zeros(len(normed), self.shape.num_routed)
        chosen.scatter_(1, routing.ids, routing.weights)
        weights = torch.ones(len(normed), self.split.num_neurons)
        for expert, own in enumerate(self.split.experts):
            weights[:, own] = chosen[:, expert, None]
        return weights

    def output(self, ffn: DenseFfn, normed: Tensor, activations: Tensor) -> Tensor:
        """[T, H] of the FFN. activations: of the dense one for this input."""
        down = ffn.down if self.down is None else self.down.float()
        return product(activations * self.weights(normed), down)


def layer_sources(
    checkpoint: Checkpoint, index: int, converted: ConvertedLayer
) -> Mapping[str, Source]:
    """The tensors of a converted layer, in the dtypes of the dense one."""
    names = layer_names(index)
    split, gate = converted.split, converted.gate
    layer = names["layer"]
    sources = {
        name: copied(checkpoint, name)
        for name in checkpoint.names()
        if name.startswith(layer) and not name.startswith(f"{layer}mlp.") and "rotary" not in name
    }
    sources[f"{names['gate']}weight"] = Source.of(gate.weight)
    sources[f"{names['gate']}e_score_correction_bias"] = Source.of(gate.correction)
    places = [(names["shared"], split.shared)]
    places += [(f"{names['expert']}{number}.", own) for number, own in enumerate(split.experts)]
    for prefix, neurons in places:
        for kind, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            source = f"{layer}mlp.{kind}.weight"
            if kind == "down_proj" and converted.down is not None:
                sources[f"{prefix}{kind}.weight"] = Source.of(converted.down[:, neurons])
            else:
                sources[f"{prefix}{kind}.weight"] = _taken(checkpoint, source, neurons, dim)
    return sources


def copied(checkpoint: Checkpoint, name: str) -> Source:
    return Source(
        checkpoint.dtype(name),
        checkpoint.shape(name),
        lambda: checkpoint.read(name),
        lambda: checkpoint.release(name),
    )


def _taken(checkpoint: Checkpoint, name: str, neurons: Tensor, dim: int) -> Source:
    shape = list(checkpoint.shape(name))
    shape[dim] = len(neurons)
    return Source(
        checkpoint.dtype(name),
        tuple(shape),
        lambda: checkpoint.read(name).index_select(dim, neurons),
        lambda: checkpoint.release(name),
    )
