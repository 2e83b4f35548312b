"""Activations against transformers' functions of the same name."""

from __future__ import annotations

import pytest
import torch
from support.randomness import fresh_generators
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moeserve.core import ExpertSpec, ModelError
from moeserve.cpu_backend.activations import (
    ELEMENTWISE,
    SWIGLU_CLAMPED,
    elementwise_activation,
    gated_activation,
)
from moeserve.experts.weights import interleave_gate_up

SPEC = ExpertSpec(num_experts=1, hidden_size=8, intermediate_size=48)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_gated_equals_transformers(name: str) -> None:
    _, generator = fresh_generators()
    gate_up = torch.randn(7, 96, generator=generator, dtype=torch.float64) * 4
    gate, up = gate_up[:, :48], gate_up[:, 48:]
    spec = ExpertSpec(num_experts=1, hidden_size=8, intermediate_size=48, activation=name)
    torch.testing.assert_close(gated_activation(spec)(gate_up), ACT2FN[name](gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clamped_swiglu_equals_gpt_oss(dtype: torch.dtype) -> None:
    rng, generator = fresh_generators()
    alpha, limit = rng.uniform(1, 2), rng.uniform(1, 8)
    config = GptOssConfig(
        hidden_size=8, intermediate_size=48, swiglu_alpha=alpha, swiglu_limit=limit
    )
    gate_up = (torch.randn(7, 96, generator=generator) * 6).to(dtype)
    spec = ExpertSpec(
        num_experts=1,
        hidden_size=8,
        intermediate_size=48,
        activation=SWIGLU_CLAMPED,
        swiglu_alpha=alpha,
        swiglu_limit=limit,
    )
    expected = GptOssExperts(config)._apply_gate(interleave_gate_up(gate_up, dim=-1))
    torch.testing.assert_close(gated_activation(spec)(gate_up), expected)


@pytest.mark.parametrize("name", [*sorted(set(ACT2FN) - set(ELEMENTWISE)), "", "SiLU"])
def test_refuses_others_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=repr(name)) as error:
        elementwise_activation(name)
    assert "silu" in str(error.value)
