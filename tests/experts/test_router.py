"""The router against the routers of transformers, on fresh random weights and input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from support.randomness import fresh_generators
from torch import Tensor
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moeserve.core import ModelError, Routing
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.packing import PackedWeight, PackFormat
from moeserve.experts.router import Router, RouterSpec, RouterWeights

EXPERTS, TOP_K, HIDDEN = 24, 5, 64
BASE = RouterSpec(num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN)
QWEN = replace(BASE, round_weights=True)
DEEPSEEK_V2 = replace(BASE, float32_logits=True, scale=2.5)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    score="sigmoid",
    normalize_eps=1e-20,
    group_score="top2_sum",
    correction_bias=True,
)
GROUPS = {"num_groups": 4, "top_groups": 2}
V2_GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
V3_PLAIN = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5}
V3_GROUPED = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}

Case = tuple[type, type, Mapping[str, Any], RouterSpec]
CASES: dict[str, Case] = {
    "mixtral": (MixtralConfig, MixtralTopKRouter, {}, replace(BASE, normalize=True)),
    "qwen2": (Qwen2MoeConfig, Qwen2MoeTopKRouter, {"norm_topk_prob": False}, QWEN),
    "qwen3": (
        Qwen3MoeConfig,
        Qwen3MoeTopKRouter,
        {"norm_topk_prob": True},
        replace(QWEN, normalize=True),
    ),
    "olmoe": (OlmoeConfig, OlmoeTopKRouter, {"norm_topk_prob": False}, QWEN),
    "deepseek_v2": (
        DeepseekV2Config,
        DeepseekV2TopkRouter,
        {"topk_method": "greedy", "routed_scaling_factor": 2.5},
        DEEPSEEK_V2,
    ),
    "deepseek_v2 groups": (
        DeepseekV2Config,
        DeepseekV2TopkRouter,
        {**V2_GROUPED, "routed_scaling_factor": 2.5},
        replace(DEEPSEEK_V2, **GROUPS),
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3TopkRouter,
        {**V3_PLAIN, "norm_topk_prob": False},
        DEEPSEEK_V3,
    ),
    "deepseek_v3 groups": (
        DeepseekV3Config,
        DeepseekV3TopkRouter,
        {**V3_GROUPED, "norm_topk_prob": True},
        replace(DEEPSEEK_V3, normalize=True, **GROUPS),
    ),
    "glm4_moe groups": (
        Glm4MoeConfig,
        Glm4MoeTopkRouter,
        {**V3_GROUPED, "norm_topk_prob": True},
        replace(DEEPSEEK_V3, normalize=True, **GROUPS),
    ),
    "gpt_oss": (
        GptOssConfig,
        GptOssTopKRouter,
        {},
        replace(BASE, score="softmax_topk", bias=True, round_weights=True),
    ),
}


def reference_router(case: Case, generator: torch.Generator) -> torch.nn.Module:
    config_class, router_class, settings, _ = case
    config = config_class(hidden_size=HIDDEN, num_experts_per_tok=TOP_K, **settings)
    # Families call it num_experts, num_local_experts or n_routed_experts, with aliases.
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        setattr(config, name, EXPERTS)
    router: torch.nn.Module = router_class(config)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator)
    return router


def our_router(spec: RouterSpec, reference: torch.nn.Module, packed: bool = False) -> Router:
    """packed: on the native kernels, all in one call."""
    tensors = {name: t.detach() for name, t in reference.state_dict().items()}
    correction = tensors.get("e_score_correction_bias")
    weight: Tensor | PackedWeight = tensors["weight"]
    if packed:
        weight = pack(tensors["weight"])
    return Router(spec, RouterWeights(weight, tensors.get("bias"), correction))


@cache
def native_runtime() -> NativeRuntime:
    return NativeRuntime(2)


def pack(weight: Tensor) -> PackedWeight:
    packed = PackedWeight(native_runtime().handle, tuple(weight.shape), PackFormat("float32"))
    packed.put(torch.arange(len(weight)), weight.float())
    return packed


def dense(ids: Tensor, weights: Tensor) -> Tensor:
    """[T, K] each to [T, E] weights: the order of the k choices is the router's own affair."""
    zeros = torch.zeros(ids.shape[0], EXPERTS, dtype=torch.float64)
    return zeros.scatter(1, ids, weights.double())


def check_form(routing: Routing, num_tokens: int) -> None:
    assert routing.ids.shape == routing.weights.shape == (num_tokens, TOP_K)
    assert routing.ids.dtype is torch.int64
    assert routing.weights.dtype is torch.float32
    assert all(len(set(row)) == TOP_K for row in routing.ids.tolist()), "an expert chosen twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 131])
@pytest.mark.parametrize("packed", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_equals_transformers(name: str, packed: bool, num_tokens: int, dtype: torch.dtype) -> None:
    """With logits that are exact in every order of summation, so that only the rule is left.

    Input and weights are small integers over a power of two: there are many ties, which must fall
    alike too. Weights may differ by the order in which float32 adds up the k of them.
    """
    _, generator = fresh_generators()
    reference = reference_router(CASES[name], generator).to(dtype)
    weight = torch.randint(-3, 4, (EXPERTS, HIDDEN), generator=generator)
    reference.get_parameter("weight").data = weight.to(dtype) / 16
    x = torch.randint(-3, 4, (num_tokens, HIDDEN), generator=generator).to(dtype) / 2
    router = our_router(CASES[name][3], reference, packed)
    assert (router.native is not None) == packed
    routing = router(x)
    check_form(routing, num_tokens)
    _, weights, ids = reference(x)
    found, expected = dense(routing.ids, routing.weights), dense(ids, weights)
    if dtype is torch.bfloat16 and CASES[name][3].round_weights:
        # A weight that lies between two numbers of bfloat16 may be rounded to either of them. That
        # befalls fewer than one in 30000: three of these 655 in one or two runs of a million.
        apart = ~torch.isclose(found, expected, rtol=1e-6, atol=0)
        assert apart.sum() <= 2
        torch.testing.assert_close(found[apart], expected[apart], rtol=2**-7, atol=0)
        found = torch.where(apart, expected, found)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_a_packed_router_sees_one_row_at_a_time(name: str) -> None:
    _, generator = fresh_generators()
    reference = reference_router(CASES[name], generator)
    router = our_router(CASES[name][3], reference, packed=True)
    x = torch.randn(37, HIDDEN, generator=generator).bfloat16()
    x[5, 3] = torch.nan
    whole = router(x)
    assert ((whole.ids >= 0) & (whole.ids < EXPERTS)).all()
    for row in range(len(x)):
        alone = router(x[row : row + 1])
        assert torch.equal(alone.ids[0], whole.ids[row])
        torch.testing.assert_close(
            alone.weights[0], whole.weights[row], rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("packed", [False, True], ids=["torch", "native"])
@torch.inference_mode()
def test_group_limit_against_brute_force(packed: bool) -> None:
    rng, generator = fresh_generators()
    for _ in range(50):
        groups = rng.choice([2, 3, 4, 6])
        top_groups = rng.randint(1, groups)
        top_k = rng.randint(1, top_groups * EXPERTS // groups)
        group_score = rng.choice(["max", "top2_sum"])
        spec = replace(
            DEEPSEEK_V3,
            top_k=top_k,
            num_groups=groups,
            top_groups=top_groups,
            group_score=group_score,
            scale=1.0,
        )
        # Negative corrections: forbidden experts must lose to chosen ones below zero.
        correction = torch.randn(EXPERTS, generator=generator) - 2
        weight = torch.randn(EXPERTS, HIDDEN, generator=generator)
        x = torch.randn(3, HIDDEN, generator=generator)
        gate = pack(weight) if packed else weight
        routing = Router(spec, RouterWeights(gate, None, correction))(x)
        for row in range(3):
            scores = (x[row].double() @ weight.double().T).sigmoid()
            choice = (scores + correction.double()).tolist()
            size = EXPERTS // groups
            members = [range(g * size, (g + 1) * size) for g in range(groups)]
            counted = 1 if group_score == "max" else 2
            values = [sum(sorted((choice[e] for e in m), reverse=True)[:counted]) for m in members]
            best = sorted(range(groups), key=lambda g: -values[g])[:top_groups]
            allowed = [e for g in best for e in members[g]]
            expected = sorted(allowed, key=lambda e: -choice[e])[:top_k]
            assert routing.ids[row].tolist() == expected
            torch.testing.assert_close(routing.weights[row], scores[expected].float())


BAD_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown score": ({"score": "relu"}, "score"),
    "unknown group score": ({"group_score": "mean"}, "group_score"),
    "no experts": ({"num_experts": 0}, "num_experts"),
    "more than all": ({"top_k": EXPERTS + 1}, "top_k"),
    "none": ({"top_k": 0}, "top_k"),
    "uneven groups": ({"num_groups": 5}, "num_groups"),
    "more groups than there are": ({"num_groups": 4, "top_groups": 5}, "top_groups"),
    "more than the groups hold": ({"num_groups": 24, "top_groups": 2, "top_k": 3}, "top_k"),
    "groups of one": (
        {"num_groups": 24, "top_groups": 6, "group_score": "top2_sum"},
        "num_groups",
    ),
    "topk softmax with groups": ({"score": "softmax_topk", **GROUPS}, "score"),
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_refuses_specs_that_mean_nothing(name: str) -> None:
    change, field = BAD_SPECS[name]
    with pytest.raises(ModelError) as error:
        replace(BASE, **change)
    assert error.value.field == field
    assert repr(change[field]) in str(error.value)


@pytest.mark.parametrize(
    ("spec", "weights", "field"),
    [
        (BASE, lambda: RouterWeights(torch.zeros(EXPERTS, HIDDEN + 1)), "weight"),
        (BASE, lambda: RouterWeights(torch.zeros(EXPERTS, HIDDEN), torch.zeros(EXPERTS)), "bias"),
        (DEEPSEEK_V3, lambda: RouterWeights(torch.zeros(EXPERTS, HIDDEN)), "correction_bias"),
    ],
)
def test_refuses_tensors_that_do_not_fit(
    spec: RouterSpec, weights: Callable[[], RouterWeights], field: str
) -> None:
    with pytest.raises(ModelError) as error:
        Router(spec, weights())
    assert error.value.field == field
