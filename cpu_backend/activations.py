"""Gated activations: what stands between an expert's first and second product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as functional
from torch import Tensor

from moeserve.core import ExpertSpec, ModelError

SWIGLU_CLAMPED = "swiglu_clamped"


def gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


#: config.json's names for the elementwise functions that are implemented. gelu_new, gelu_fast and
#: gelu_accurate write gelu_pytorch_tanh's formula out; they differ in rounding only.
ELEMENTWISE: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": functional.silu,
        "swish": functional.silu,
        "gelu": functional.gelu,
        "gelu_python": functional.gelu,
        "gelu_pytorch_tanh": gelu_tanh,
        "gelu_python_tanh": gelu_tanh,
        "gelu_new": gelu_tanh,
        "gelu_fast": gelu_tanh,
        "gelu_accurate": gelu_tanh,
        "quick_gelu": quick_gelu,
        "relu": functional.relu,
    }
)


def elementwise_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that config.json calls `name`; ModelError where it is not implemented."""
    if name not in ELEMENTWISE:
        known = ", ".join(ELEMENTWISE)
        raise ModelError(f"hidden_act: {name!r} is not one of {known}", field="hidden_act")
    return ELEMENTWISE[name]


def gated_activation(spec: ExpertSpec) -> Callable[[Tensor], Tensor]:
    """The function from gate_up [..., 2I] (gate, then up) to [..., I] that the spec names."""
    if spec.activation == SWIGLU_CLAMPED:
        alpha, limit = spec.swiglu_alpha, spec.swiglu_limit

        def swiglu_clamped(gate_up: Tensor) -> Tensor:
            """gpt-oss: gate clamped from above, up from both sides, up shifted by one."""
            gate, up = gate_up.chunk(2, dim=-1)
            gate = gate.clamp(max=limit)
            return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(gate * alpha))

        return swiglu_clamped

    function = elementwise_activation(spec.activation)

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return function(gate) * up

    return gated
