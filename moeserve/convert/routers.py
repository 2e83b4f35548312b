"""Routers that nobody trained, and how well they agree with the best choice.

The best choice of k experts for a token, as far as it can be said without trying all: those whose
outputs have the largest norms. A router foresees it from the FFN's input by one linear layer.

representative: the gate row of the neuron that stands for its expert (CMoE, section 3.3).
mean_gate: the mean of an expert's gate rows (MoEfication, section 3.2).
least_squares: a linear regression of the norms, with a bias, on the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from moeserve.convert.methods import LayerSample, Split
from moeserve.convert.ridge import add_ridge
from moeserve.convert.run_layers import STEP_TOKENS

#: of the mean square of an input: what the regression takes for noise
RIDGE = 1e-3


@dataclass(frozen=True)
class LinearRouter:
    """Scores x @ weight.T + bias. weight: [C, H] of the experts to choose from. bias: [C]."""

    weight: Tensor
    bias: Tensor

    def scores(self, normed: Tensor) -> Tensor:
        return normed @ self.weight.T + self.bias


def chosen_experts(split: Split) -> Tensor:
    """[C, m]: the neurons of the experts that there is a choice of."""
    return split.experts[split.always_on :]


def expert_norms(sample: LayerSample, experts: Tensor) -> Tensor:
    """[T, C]: the norm of each expert's output."""
    down = sample.ffn.down
    norms = [(sample.activations[:, own] @ down[:, own].T).norm(dim=1) for own in experts]
    return torch.stack(norms, dim=1)


def representative(sample: LayerSample, experts: Tensor, norms: Tensor) -> LinearRouter:
    """The neuron whose activation goes most with its expert's norm."""
    rows = []
    centred = norms - norms.mean(0)
    for expert, own in enumerate(experts):
        acts = sample.activations[:, own].abs()
        acts = acts - acts.mean(0)
        likeness = (acts.T @ centred[:, expert]) / acts.norm(dim=0).clamp_min(1e-30)
        rows.append(sample.ffn.gate[own[likeness.argmax()]])
    return _without_bias(torch.stack(rows))


def mean_gate(sample: LayerSample, experts: Tensor, norms: Tensor) -> LinearRouter:
    return _without_bias(sample.ffn.gate[experts].mean(1))


def least_squares(sample: LayerSample, experts: Tensor, norms: Tensor) -> LinearRouter:
    # What all experts share of a token's norm changes no choice, and is half of what there is
    # to explain.
    targets = norms - norms.mean(1, keepdim=True)
    x_mean = sample.normed.mean(0, dtype=torch.float64)
    y_mean = targets.mean(0, dtype=torch.float64)
    gram = torch.zeros(len(x_mean), len(x_mean), dtype=torch.float64)
    cross = torch.zeros(len(x_mean), len(y_mean), dtype=torch.float64)
    for rows in torch.arange(len(norms)).split(STEP_TOKENS):
        x = sample.normed[rows].double() - x_mean
        gram.addmm_(x.T, x)
        cross.addmm_(x.T, targets[rows].double() - y_mean)
    add_ridge(gram, RIDGE)
    weight = torch.linalg.solve(gram, cross).T  # [C, H]
    return LinearRouter(weight.float(), (y_mean - weight @ x_mean).float())


Fit = Callable[[LayerSample, Tensor, Tensor], LinearRouter]
ROUTERS: Mapping[str, Fit] = MappingProxyType(
    {
        "least_squares": least_squares,
        "mean_gate": mean_gate,
        "representative": representative,
    }
)


def agreement(scores: Tensor, norms: Tensor, k: int) -> float:
    """The share of the k experts with the largest norms that the k highest scores name."""
    if k == 0:
        return 1.0
    wanted = torch.zeros_like(norms, dtype=torch.bool).scatter_(1, norms.topk(k, 1).indices, True)
    return float(wanted.gather(1, scores.topk(k, 1).indices).float().mean())


def _without_bias(weight: Tensor) -> LinearRouter:
    return LinearRouter(weight, torch.zeros(len(weight)))
