"""Hidden states to Routing: every scoring rule the families need, as data.

Sources, by value of `RouterSpec`:
softmax over all experts, then top-k: Mixtral (arXiv 2401.04088), Qwen MoE, OLMoE (2409.02060).
group-limited softmax: DeepSeek-V2 (2405.04434, section 2.2.2).
sigmoid with a correction bias that chooses but does not weigh, groups ranked by the sum of their
two best: DeepSeek-V3 (2412.19437, sections 2.1.2 and 4.2), GLM-4.5 (2508.06471).
top-k of the logits, then softmax over those k: gpt-oss (2508.10925).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeserve.core import ModelError, Routing
from moeserve.cpu_backend.linear import make_linear
from moeserve.cpu_backend.native_linear import NativeLinear
from moeserve.cpu_backend.native_router import NativeRouter
from moeserve.cpu_backend.packing import PackedWeight

SCORES = ("softmax", "sigmoid", "softmax_topk")
GROUP_SCORES = ("max", "top2_sum")


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How one MoE layer chooses its experts. Pure data; construction checks it (ModelError)."""

    num_experts: int
    top_k: int
    hidden_size: int
    #: softmax or sigmoid of all logits, then top-k; softmax_topk: top-k, then softmax of those
    score: str = "softmax"
    #: logits in float32 whatever the compute dtype (DeepSeek, GLM); else in the compute dtype
    float32_logits: bool = False
    #: divide the k weights by their sum plus `normalize_eps`
    normalize: bool = False
    normalize_eps: float = 0.0
    #: factor on the weights, after normalisation
    scale: float = 1.0
    #: experts stand in that many groups of equal size; the best `top_groups` groups may be chosen
    num_groups: int = 1
    top_groups: int = 1
    #: value of a group: its best expert, or the sum of its two best
    group_score: str = "max"
    #: a per-expert bias is added to the logits (gpt-oss)
    bias: bool = False
    #: a per-expert bias is added to the scores when choosing, not when weighing
    correction_bias: bool = False
    #: round the weights to the compute dtype, as the family's reference does (Qwen, OLMoE, gpt-oss)
    round_weights: bool = False

    def __post_init__(self) -> None:
        self._check("score", self.score, self.score in SCORES, f"one of {', '.join(SCORES)}")
        good = self.group_score in GROUP_SCORES
        self._check("group_score", self.group_score, good, f"one of {', '.join(GROUP_SCORES)}")
        self._check("num_experts", self.num_experts, self.num_experts >= 1, "1 or more")
        groups = self.num_groups
        good = groups >= 1 and self.num_experts % groups == 0
        self._check("num_groups", groups, good, f"a divisor of num_experts ({self.num_experts})")
        good = 1 <= self.top_groups <= groups
        self._check("top_groups", self.top_groups, good, f"1 to num_groups ({groups})")
        group_size = self.num_experts // groups
        reachable = self.top_groups * group_size
        good = 1 <= self.top_k <= reachable
        self._check(
            "top_k", self.top_k, good, f"1 to {reachable}, the experts of top_groups groups"
        )
        if self.limits_groups and self.group_score == "top2_sum":
            self._check("num_groups", groups, group_size >= 2, "at least two experts in a group")
        if self.score == "softmax_topk":
            plain = not (self.limits_groups or self.correction_bias or self.normalize)
            limit = "softmax_topk takes no groups, correction bias or normalisation"
            self._check("score", self.score, plain, limit)

    @property
    def limits_groups(self) -> bool:
        """Whether some experts are out of reach of a token because of its groups."""
        return self.top_groups < self.num_groups

    @staticmethod
    def _check(field: str, value: object, good: bool, limit: str) -> None:
        if not good:
            raise ModelError(f"router {field}: {value!r}; allowed: {limit}", field=field)


def shared_gate_spec(hidden_size: int) -> RouterSpec:
    """The sigmoid gate of a shared expert: the router of one expert (Qwen2-MoE)."""
    return RouterSpec(
        num_experts=1, top_k=1, hidden_size=hidden_size, score="sigmoid", round_weights=True
    )


@dataclass(frozen=True)
class RouterWeights:
    """weight: [E, H], also packed. bias, correction_bias: [E], present exactly where the spec says
    so."""

    weight: Tensor | PackedWeight
    bias: Tensor | None = None
    correction_bias: Tensor | None = None


class Routes(Protocol):
    """What a layer needs of its router."""

    @property
    def spec(self) -> RouterSpec: ...

    def __call__(self, x: Tensor) -> Routing:
        """x [T, H] to each row's experts."""


class Router:
    """The gate of one MoE layer: `router(x)` with x [T, H] gives the Routing of its T tokens."""

    def __init__(self, spec: RouterSpec, weights: RouterWeights) -> None:
        """Raises ModelError where tensors and spec do not fit."""
        _check_shapes(spec, weights)
        self.spec = spec
        self.weights = weights
        weight, bias = weights.weight, weights.bias
        if isinstance(weight, Tensor) and spec.float32_logits:
            weight, bias = weight.float(), None if bias is None else bias.float()
        self._linear = make_linear(weight, bias)
        correction = weights.correction_bias
        self._correction = None if correction is None else correction.to(torch.float32)
        #: all of it in one call, where the weight is packed
        self.native: NativeRouter | None = None
        if isinstance(self._linear, NativeLinear):
            self.native = _native_router(spec, self._linear, self._correction)

    def __call__(self, x: Tensor) -> Routing:
        spec = self.spec
        if self.native is not None:
            return self.native(x)
        logits = self._linear(x.float() if spec.float32_logits else x)  # [T, E]
        if spec.score == "softmax_topk":
            # Chosen before float32, so that ties of rounded logits fall as in the reference.
            top_logits, ids = logits.topk(spec.top_k, dim=-1)  # [T, K]
            weights = top_logits.softmax(dim=-1, dtype=torch.float32)
        else:
            scores = self._scores(logits.float())
            ids, weights = self._choose(scores)
        if spec.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + spec.normalize_eps)
        if spec.scale != 1.0:
            weights = weights * spec.scale
        if spec.round_weights and x.dtype != torch.float32:
            weights = weights.to(x.dtype).float()
        return Routing(ids=ids, weights=weights)

    def _scores(self, logits: Tensor) -> Tensor:
        if self.spec.score == "softmax":
            return logits.softmax(dim=-1)
        # In float64, whose last bits are lost: in float32 a number's rounding depends on where in a
        # vector register it stands, so a row's scores would depend on how many rows there are.
        return logits.double().sigmoid().float()

    def ranking(self, logits: Tensor) -> Tensor:
        """[T, E] logits to the numbers whose top_k largest are chosen, in the same order as by
        `__call__`; -inf for experts out of the row's reach. For predictors."""
        if self.spec.score == "softmax_topk":
            return logits
        scores = self._scores(logits.float())
        return self._choice(scores)

    @property
    def ranks_logits(self) -> bool:
        """Whether `ranking` would change nothing in the order of a row's logits."""
        return self._correction is None and not self.spec.limits_groups

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """scores [T, E] float32 to ids and the scores there, both [T, K]."""
        choice = self._choice(scores)
        top, ids = choice.topk(self.spec.top_k, dim=-1)
        return ids, top if self._correction is None else scores.gather(-1, ids)

    def _choice(self, scores: Tensor) -> Tensor:
        """scores [T, E] to what experts are chosen by."""
        choice = scores if self._correction is None else scores + self._correction
        return self._mask_groups(choice) if self.spec.limits_groups else choice

    def _mask_groups(self, choice: Tensor) -> Tensor:
        """Puts experts outside the token's best groups at -inf.

        Not at 0: a corrected score may be negative, and 0 would then let a forbidden expert win.
        """
        spec = self.spec
        grouped = torch.unflatten(choice, -1, (spec.num_groups, -1))  # [T, G, E/G]
        if spec.group_score == "max":
            group_scores = grouped.amax(dim=-1)  # [T, G]
        else:
            group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        best = group_scores.topk(spec.top_groups, dim=-1).indices  # [T, top_groups]
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, best, False)
        return grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(-2)


def _native_router(spec: RouterSpec, gate: NativeLinear, correction: Tensor | None) -> NativeRouter:
    return NativeRouter(
        gate,
        top_k=spec.top_k,
        score=spec.score,
        float32_logits=spec.float32_logits,
        normalize=spec.normalize,
        normalize_eps=spec.normalize_eps,
        scale=spec.scale,
        num_groups=spec.num_groups,
        top_groups=spec.top_groups,
        group_top2=spec.group_score == "top2_sum",
        correction=correction,
        round_weights=spec.round_weights,
    )


def _check_shapes(spec: RouterSpec, weights: RouterWeights) -> None:
    experts = (spec.num_experts,)
    expected: dict[str, tuple[Tensor | PackedWeight | None, tuple[int, ...] | None]] = {
        "weight": (weights.weight, (spec.num_experts, spec.hidden_size)),
        "bias": (weights.bias, experts if spec.bias else None),
        "correction_bias": (weights.correction_bias, experts if spec.correction_bias else None),
    }
    for name, (tensor, shape) in expected.items():
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise ModelError(f"router {name}: shape {found}, expected {shape}", field=name)
