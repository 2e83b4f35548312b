"""Which neurons of an FFN stand together: the methods behind one interface.

A neuron is a row of gate and up with its column of down. An FFN is the sum of its neurons, so that
any way of cutting it into parts gives the same sum; methods differ in what is lost when some parts
are left out.

activation: the neurons that matter most stand in the shared expert, the others are clustered by
    the tokens for which they matter, into clusters of equal size (CMoE, arXiv:2502.04416, section
    3; Read-ME, arXiv:2410.19123).
weight: balanced k-means on the rows of gate (MoEfication, arXiv:2110.01786, section 3.1).
contiguous: in the order in which they stand (FactorLLM, arXiv:2408.11855).
random: in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from moeserve.convert.balanced import balanced_kmeans
from moeserve.convert.run_layers import DenseFfn
from moeserve.convert.settings import ConvertSettings, MoeShape

#: tokens whose activations are compared when neurons are clustered
CLUSTER_TOKENS = 8192
#: numbers per neuron in which the comparison is done
CLUSTER_DIMS = 256
#: a neuron is always on, where the shares are each layer's own, if it is among a token's most
#: important ones for that share of the tokens
ALWAYS_SHARE = 0.9


@dataclass(frozen=True)
class LayerSample:
    """An FFN and what it did on calibration text.

    normed: [T, H], its input. activations: [T, I]. cost: [I], the mean over tokens of the squared
    norm of what a neuron adds to the output.
    """

    ffn: DenseFfn
    normed: Tensor
    activations: Tensor
    cost: Tensor

    @staticmethod
    def of(ffn: DenseFfn, normed: Tensor, activations: Tensor) -> LayerSample:
        mean_square = torch.einsum("ti,ti->i", activations, activations) / len(activations)
        return LayerSample(ffn, normed, activations, mean_square * ffn.down.square().sum(0))


@dataclass(frozen=True)
class Split:
    """Numbers of neurons. shared: [S * m]. experts: [E, m], of which the first `always_on` work on
    every token."""

    shared: Tensor
    experts: Tensor
    always_on: int

    @property
    def num_neurons(self) -> int:
        return len(self.shared) + self.experts.numel()


#: (sample, parts, parts that are always on, seed) -> [parts, m] neurons, those always on first
Method = Callable[[LayerSample, int, int, int], Tensor]


def split_layer(
    sample: LayerSample, settings: ConvertSettings, shape: MoeShape, layer: int
) -> Split:
    """Each layer has random numbers of its own, whichever layers were done before."""
    num_on = num_always_on(sample, settings, shape)
    seed = settings.seed * 1_000_003 + layer
    parts = METHODS[settings.method](sample, settings.experts, num_on, seed)
    parts = parts.sort(dim=1).values
    shared, experts = parts[: shape.num_shared], parts[shape.num_shared :]
    return Split(shared.flatten(), experts, num_on - shape.num_shared)


def num_always_on(sample: LayerSample, settings: ConvertSettings, shape: MoeShape) -> int:
    """Parts that work on every token of this layer.

    Without a share that is the same for all layers it is as large as the number of neurons that
    matter for nearly every token, which differs from layer to layer (after ExpertWeaver,
    arXiv:2602.15521, which goes by how much activations vary).
    """
    if settings.shared_share is not None or shape.all_active:
        return shape.num_shared
    important = _importance(sample)
    count = settings.active * shape.part_size
    least = important.kthvalue(important.shape[1] - count + 1, dim=1, keepdim=True).values
    often = (important >= least).float().mean(0) >= ALWAYS_SHARE
    parts = int(often.sum()) // shape.part_size
    return min(max(parts, shape.num_shared), settings.active - 1)


def by_activation(sample: LayerSample, parts: int, num_on: int, seed: int) -> Tensor:
    size = len(sample.cost) // parts
    order = sample.cost.argsort(descending=True, stable=True)
    rest = order[num_on * size :]
    features = torch.nn.functional.normalize(_importance(sample)[:, rest].T, dim=1)  # [N, t]
    if features.shape[1] > CLUSTER_DIMS:
        # Distances survive a random projection (Johnson, Lindenstrauss 1984).
        generator = torch.Generator().manual_seed(seed)
        features = features @ torch.randn(features.shape[1], CLUSTER_DIMS, generator=generator)
        features /= CLUSTER_DIMS**0.5
    clusters = balanced_kmeans(features.double().numpy(), parts - num_on, seed)
    clustered = rest[torch.from_numpy(clusters).argsort(stable=True)]
    return torch.cat((order[: num_on * size], clustered)).view(parts, size)


def by_weight(sample: LayerSample, parts: int, num_on: int, seed: int) -> Tensor:
    """Clusters of all neurons; those that add most are always on."""
    rows = torch.nn.functional.normalize(sample.ffn.gate, dim=1)
    clusters = torch.from_numpy(balanced_kmeans(rows.double().numpy(), parts, seed))
    made = clusters.argsort(stable=True).view(parts, -1)
    return made[sample.cost[made].sum(1).argsort(descending=True, stable=True)]


def contiguous(sample: LayerSample, parts: int, num_on: int, seed: int) -> Tensor:
    return torch.arange(len(sample.cost)).view(parts, -1)


def at_random(sample: LayerSample, parts: int, num_on: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(sample.cost), generator=generator).view(parts, -1)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "activation": by_activation,
        "weight": by_weight,
        "contiguous": contiguous,
        "random": at_random,
    }
)


def _importance(sample: LayerSample) -> Tensor:
    """[t, I]: the norm of what each neuron adds, for tokens taken evenly."""
    count = len(sample.activations)
    rows = torch.arange(min(count, CLUSTER_TOKENS)) * count // min(count, CLUSTER_TOKENS)
    importance: Tensor = sample.activations[rows].abs() * sample.ffn.down.norm(dim=0)
    return importance
