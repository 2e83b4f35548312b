"""One MoE layer in bfloat16: a torch loop and transformers' experts. See layer_work.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from peers.layer_work import (
    Call,
    Experts,
    LayerShape,
    LayerWeights,
    linear_loop,
    random_layer,
    relative_error,
    time_layer,
)

ROWS = (1, 16)
IMPLEMENTATIONS = ("eager", "grouped_mm")


@torch.inference_mode()
def run(settings: dict[str, Any]) -> dict[str, Any]:
    """settings: threads, shape. Name -> rows -> milliseconds."""
    torch.set_num_threads(settings["threads"])
    shape = LayerShape(**settings["shape"])
    weights = random_layer(shape, torch.bfloat16)
    calls: dict[str, Call] = {
        "torch F.linear loop": lambda layer, x, experts: linear_loop(weights, x, experts)
    }
    for name in IMPLEMENTATIONS:
        calls[f"transformers {name}"] = _transformers(shape, weights, name)
    return {
        "layer": {
            name: {str(n): time_layer(call, shape, 1, n, torch.bfloat16) for n in ROWS}
            for name, call in calls.items()
        },
        "relative_error": {
            name: relative_error(call, weights, shape) for name, call in calls.items()
        },
        "notes": {"torch": torch.__version__},
    }


def _transformers(shape: LayerShape, weights: LayerWeights, implementation: str) -> Call:
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(weights.gate_up, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(weights.down, requires_grad=False)

    def call(layer: int, x: Tensor, chosen: Experts) -> Tensor:
        result: Tensor = experts(x, chosen.ids, chosen.weights.to(x.dtype))
        return result

    return call
