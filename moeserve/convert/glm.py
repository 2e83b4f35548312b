"""What is written: `glm4_moe`, whose experts' weights are made to be one.

glm4_moe (GLM-4.5) has grouped-query attention with or without biases and head norms, a shared
expert, and a router of sigmoid scores s = sigmoid(w x) that chooses by s + correction and weighs by
routed_scaling_factor * s. With small logits and a factor of two every chosen expert weighs one, up
to SPREAD; a correction of one makes an expert always chosen, and a gate row of zeros makes it weigh
exactly one. docs/conversion.md has the other candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeserve.convert.dense import DenseModel
from moeserve.convert.routers import LinearRouter
from moeserve.convert.settings import MoeShape
from moeserve.experts.router import RouterSpec
from moeserve.models.spec import (
    LinearScaling,
    Llama3Scaling,
    QkNorm,
    RopeScaling,
    YarnScaling,
)

#: standard deviation of experts' weights around one. Choosing and weighing are the same number in
#: this architecture: smaller, and experts that are hardly better would fall by the rounding of
#: float32, which differs from one program to the next; larger, and the weights would matter.
SPREAD = 2.0**-8
#: on scores, which are between 0 and 1
ALWAYS_CHOSEN = 1.0
WEIGHT_FACTOR = 2.0
#: 16 bytes of a 16-bit type
GROUPED_NUMBERS = 8
#: config.json's fields that mean the same in both architectures
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout")


@dataclass(frozen=True)
class Gate:
    """weight: [E, H]. correction: [E] float32."""

    weight: Tensor
    correction: Tensor


def make_gate(
    router: LinearRouter | None,
    num_experts: int,
    always_on: int,
    normed: Tensor,
    dtype: torch.dtype,
) -> Gate:
    """The router in glm4_moe's terms, its weight in the dtype of the checkpoint.

    router: of the experts after those always on; None where every expert is active and nothing is
    to be chosen. normed: [T, H], over which the spread is meant.
    """
    weight = torch.zeros(num_experts, normed.shape[1])
    correction = torch.zeros(num_experts)
    if router is not None:
        # What is added to all scores of a token chooses nothing, and would be in the weights.
        rows = router.weight - router.weight.mean(0)
        bias = router.bias - router.bias.mean()
        # sigmoid(z) is 1/2 + z/4 for small z, so a weight is 1 + z/2 and a bias counts a quarter.
        scale = 2 * SPREAD / (normed @ rows.T).std().clamp_min(1e-30)
        weight[always_on:] = rows * scale
        correction[always_on:] = bias * scale / 4
        correction[:always_on] = ALWAYS_CHOSEN
    return Gate(weight.to(dtype), correction)


def router_spec(shape: MoeShape, hidden_size: int) -> RouterSpec:
    """As glm4_moe's family reads it from the config below."""
    return RouterSpec(
        num_experts=shape.num_routed,
        top_k=shape.top_k,
        hidden_size=hidden_size,
        score="sigmoid",
        float32_logits=True,
        scale=WEIGHT_FACTOR,
        group_score="top2_sum",
        correction_bias=True,
    )


def glm_config(model: DenseModel, shape: MoeShape) -> dict[str, Any]:
    """config.json of the converted model."""
    spec, attention, raw = model.spec, model.attention, model.raw
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **{name: raw[name] for name in KEPT if name in raw},
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": model.ffn.intermediate_size,  # of dense layers; there are none
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "use_qk_norm": attention.qk_norm is QkNorm.HEAD,
        "hidden_act": model.ffn.activation,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "max_position_embeddings": model.context_tokens,
        "rope_parameters": rope_parameters(model),
        "moe_intermediate_size": shape.part_size,
        "n_shared_experts": shape.num_shared,
        "n_routed_experts": shape.num_routed,
        "num_experts_per_tok": shape.top_k,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": WEIGHT_FACTOR,
        "use_cache": True,
        "dtype": raw.get("dtype") or raw.get("torch_dtype"),
        **({} if grouped_note(model, shape) is None else {"experts_implementation": "eager"}),
    }


def grouped_note(model: DenseModel, shape: MoeShape) -> str | None:
    """Why transformers is told to run the experts one after the other, and what would help; None
    where it need not.

    Its own choice, grouped products (torch's grouped_mm), wants rows of a multiple of 16 bytes:
    8 numbers in the 16-bit types that a model of any dtype may be loaded in.
    """
    hidden, size = model.spec.hidden_size, shape.part_size
    if size % GROUPED_NUMBERS == 0 and hidden % GROUPED_NUMBERS == 0:
        return None
    neurons = model.ffn.intermediate_size
    fits = [n for n in range(3, neurons + 1) if neurons % (n * GROUPED_NUMBERS) == 0]
    near = sorted(fits, key=lambda n: abs(n - shape.num_shared - shape.num_routed))[:3]
    fix = f"--experts {' or '.join(map(str, sorted(near)))} would" if near else "no --experts would"
    if hidden % GROUPED_NUMBERS:
        fix = "no --experts would"
    return (
        f"parts of {size} neurons, hidden size {hidden}: the grouped products of transformers want "
        f"multiples of {GROUPED_NUMBERS}, so config.json has experts_implementation: eager, which "
        f"is slower there ({fix} do without)"
    )


def rope_parameters(model: DenseModel) -> dict[str, Any]:
    """transformers 5's one section, from what the dense config was understood to say.

    Every number is written out: none is left to be derived from max_position_embeddings, which is
    another one here where a window slides, nor from fields of other forms of config.json.
    """
    rope = model.attention.rope
    return {
        **_scaling(rope.scaling, model),
        "rope_theta": rope.theta,
        "partial_rotary_factor": 1.0,  # glm4_moe's default is a half
    }


def _scaling(scaling: RopeScaling | None, model: DenseModel) -> dict[str, Any]:
    if scaling is None:
        section = model.raw.get("rope_parameters") or model.raw.get("rope_scaling") or {}
        if "dynamic" in (section.get("rope_type"), section.get("type")):
            # Not there up to the context, but other programs may go beyond it.
            return {"rope_type": "dynamic", "factor": section["factor"]}
        return {"rope_type": "default"}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    original = {"original_max_position_embeddings": scaling.original_context_tokens}
    if isinstance(scaling, Llama3Scaling):
        names: tuple[str, ...] = ("factor", "low_freq_factor", "high_freq_factor")
        return {"rope_type": "llama3", **original, **{n: getattr(scaling, n) for n in names}}
    if isinstance(scaling, YarnScaling):
        names = ("factor", "beta_fast", "beta_slow", "attention_factor", "truncate")
        return {"rope_type": "yarn", **original, **{n: getattr(scaling, n) for n in names}}
    return {
        "rope_type": "longrope",
        **original,
        "short_factor": list(scaling.short_factors),
        "long_factor": list(scaling.long_factors),
        "attention_factor": scaling.attention_factor,
        # what attention_factor would follow from; transformers asks for it
        "factor": max(1.0, model.spec.context_tokens / scaling.original_context_tokens),
    }


def layer_names(index: int) -> Mapping[str, str]:
    """Prefixes of a converted layer's tensors."""
    prefix = f"model.layers.{index}."
    return {
        "layer": prefix,
        "gate": f"{prefix}mlp.gate.",
        "shared": f"{prefix}mlp.shared_experts.",
        "expert": f"{prefix}mlp.experts.",
    }
