"""One MoE layer in bfloat16 by IPEX (intel-extension-for-pytorch 2.8), in a venv that has it."""

from __future__ import annotations

from typing import Any

import intel_extension_for_pytorch as ipex
import torch
from torch import Tensor

from peers.layer_work import (
    Experts,
    LayerShape,
    random_layer,
    relative_error,
    time_layer,
)

ROWS = (1, 16)


@torch.inference_mode()
def run(settings: dict[str, Any]) -> dict[str, Any]:
    """settings: threads, shape. Both of GatedMLPMOE's forms, by rows, in milliseconds."""
    torch.set_num_threads(settings["threads"])
    shape = LayerShape(**settings["shape"])
    weights = random_layer(shape, torch.bfloat16)
    times: dict[str, dict[str, float]] = {}
    errors: dict[str, float] = {}
    for prepack in (False, True):
        layer = ipex.llm.modules.GatedMLPMOE(weights.gate_up, weights.down, use_prepack=prepack)

        def call(number: int, x: Tensor, chosen: Experts, layer: Any = layer) -> Tensor:
            # The routing is given, as for every other way: the router's logits are not looked at.
            def route(**unused: Any) -> tuple[Tensor, Tensor]:
                return chosen.weights, chosen.ids

            logits = x.new_empty(len(x), shape.num_experts)
            result: Tensor = layer(
                x, False, shape.top_k, logits, True, custom_routing_function=route
            )
            return result

        name = f"IPEX GatedMLPMOE, {'prepacked' if prepack else 'plain'}"
        errors[name] = relative_error(call, weights, shape)
        times[name] = {str(n): time_layer(call, shape, 1, n, torch.bfloat16) for n in ROWS}
    return {
        "layer": times,
        "relative_error": errors,
        "notes": {"ipex": ipex.__version__, "torch": torch.__version__},
    }
