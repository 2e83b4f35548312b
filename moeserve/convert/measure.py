"""How good a conversion is, on text that was kept back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve.convert.converted import ConvertedLayer
from moeserve.convert.dense import DenseModel
from moeserve.convert.methods import LayerSample
from moeserve.convert.routers import LinearRouter, agreement, chosen_experts, expert_norms
from moeserve.convert.run_layers import STEP_TOKENS, product
from moeserve.core import ModelError

#: of loss per token; beyond e ** that float64 ends
MOST_NATS = 700


def judge(
    router: LinearRouter | None, layer: ConvertedLayer, held: LayerSample
) -> dict[str, float]:
    """agreement with the best choice; chance: that of a choice by dice; lost, lost_best: the mean
    square of what is left out of the FFN's output, over that of the output, by the router's choice
    and by the best one; error: of the converted FFN's output, as it is written."""
    if router is None:
        return {"agreement": 1.0, "chance": 1.0, "lost": 0.0, "lost_best": 0.0, "error": 0.0}
    split = layer.split
    experts = chosen_experts(split)
    k = layer.shape.top_k - split.always_on
    norms, scores = expert_norms(held, experts), router.scores(held.normed)
    output = product(held.activations, held.ffn.down)
    size = output.square().sum()

    def share(part: Tensor) -> float:
        return float(part.square().sum() / size) if size > 0 else 0.0  # of nothing none is missing

    def lost(choice: Tensor) -> float:
        left_out = held.activations * _mask(choice, experts, len(held.cost))
        return share(product(left_out, held.ffn.down))

    idle = len(experts) - k
    converted = layer.output(held.ffn, held.normed, held.activations)
    return {
        "agreement": agreement(scores, norms, k),
        "chance": k / len(experts),
        "lost": lost(scores.topk(idle, 1, largest=False).indices),
        "lost_best": lost(norms.topk(idle, 1, largest=False).indices),
        "error": share(converted - output),
    }


def _mask(choice: Tensor, experts: Tensor, num_neurons: int) -> Tensor:
    """[T, K] experts to [T, I]: 1 for their neurons."""
    of_neuron = torch.full((num_neurons,), len(experts))
    of_neuron[experts] = torch.arange(len(experts))[:, None]
    chosen = torch.zeros(len(choice), len(experts) + 1).scatter_(1, choice, 1.0)
    return chosen[:, of_neuron]


def measure_perplexity(model: DenseModel, hidden: Tensor, windows: Tensor) -> float:
    """hidden: [T, H] after the last layer. The vocabulary comes piece by piece, as it lies on
    disk: its weights in float32 may be larger than a layer.

    Raises ModelError where logits are so large that there is none.
    """
    hidden = F.rms_norm(hidden, hidden.shape[1:], model.end("norm"), model.spec.norm_eps)
    length = windows.shape[1]
    hidden = hidden.view(-1, length, hidden.shape[1])[:, :-1].flatten(0, 1)
    targets = windows[:, 1:].flatten()
    head = model.checkpoint.read(model.head_name)
    total = torch.full((len(hidden),), -torch.inf, dtype=torch.float64)
    own = torch.zeros(len(hidden), dtype=torch.float64)
    step = max(1, (16 << 20) // head.shape[1])
    for start in range(0, len(head), step):
        rows = head[start : start + step].float()
        inside = (targets >= start) & (targets < start + len(rows))
        for part in torch.arange(len(hidden)).split(STEP_TOKENS // 4):
            logits = (hidden[part] @ rows.T).double()
            total[part] = torch.logaddexp(total[part], logits.logsumexp(1))
            mine = part[inside[part]]
            own[mine] = logits[inside[part]].gather(1, (targets[mine] - start)[:, None])[:, 0]
    model.checkpoint.release(model.head_name)
    loss = float((total - own).mean())
    if not loss < MOST_NATS:
        raise ModelError(
            f"{model.path}: {loss:.3g} nats per token on the calibration text; a perplexity can be "
            f"told below {MOST_NATS}: logits are too large, from norm or {model.head_name}",
            field="text",
            hint="try the dense model on the text with `moeserve eval ppl`; it may be damaged",
        )
    return math.exp(loss)
