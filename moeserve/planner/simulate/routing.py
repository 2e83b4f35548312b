"""Which experts simulated tokens choose: recorded, or drawn from a popularity.

What decides about experts is not how often each is chosen alone. The cache lives of those that come
again soon, and a batch reads each of its experts once, however many rows want it. Both follow from
tokens that choose experts, so a popularity becomes a trace, too, by drawing tokens from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moeserve.cache.routing_trace import RoutingTrace, check_for_model
from moeserve.planner.shapes import ModelShape

Ids = NDArray[np.int64]
#: tokens that are drawn from a popularity
DRAWN_TOKENS = 4096
#: layers whose experts are simulated, at most, and experts of them all together (few: where many
#: deployments are compared): the other layers are like them
MOST_LAYERS, MOST_EXPERTS, FEW_EXPERTS = 8, 1024, 512
#: tokens of a long text between two requests
STRIDE = 797
#: added to what a logarithm is taken of
LEAST = np.float32(1e-30)
#: tokens after which a text has drifted to other experts
DRIFT_TOKENS = 24


@dataclass(frozen=True)
class Skew:
    """How unlike each other experts are in use, in standard deviations of log odds.

    popularity: between the experts of a layer, at all times. context: within a text for a while.
    """

    popularity: float
    context: float


#: where nothing is known. HIGH is like gpt-oss-20b while it decodes (of one stream's uses 0.65 are
#: hits where LRU has slots for a quarter of a layer, 0.89 for half), and MID is between it and
#: DeepSeek-V2-Lite (0.55, 0.79), as recorded; LOW is nearly as even as balanced training aims at
LOW_SKEW, MID_SKEW, HIGH_SKEW = Skew(0.35, 0.7), Skew(0.8, 1.3), Skew(1.0, 1.5)


@dataclass(frozen=True)
class SimulatedRouting:
    """ids: [T, L, K], experts of T tokens in the simulated layers. weights: likewise, of their
    routers. num_experts: of a layer.
    layers: the simulated ones, by their index in the model. num_layers: of all MoE layers.
    requests: (first token, tokens) of each that was recorded; empty: one long text."""

    ids: Ids
    weights: NDArray[np.float32]
    num_experts: int
    layers: tuple[int, ...]
    num_layers: int
    requests: tuple[tuple[int, int], ...] = ()
    _prompts: dict[int, NDArray[np.int64]] = field(default_factory=dict, compare=False)

    @property
    def share(self) -> float:
        """Simulated layers, of all."""
        return len(self.layers) / self.num_layers

    def places(
        self, request: int, positions: NDArray[np.int64], num_prompt: int, num_output: int
    ) -> NDArray[np.int64]:
        """Tokens of the trace that stand for positions [N] of a simulated request.

        A recorded request ends with its answer: answers are like the ends of recorded ones, and
        prompts like all that comes before these, one after the other.
        """
        if not self.requests:
            return (positions + request * STRIDE) % len(self.ids)
        prompts = self._prompts.get(num_output)
        if prompts is None:
            parts = [np.arange(s, s + n - _answer(n, num_output)) for s, n in self.requests]
            prompts = self._prompts[num_output] = np.concatenate(parts)
        start, length = self.requests[request % len(self.requests)]
        answer = _answer(length, num_output)
        # More requests than were recorded say the same, but not all of them in one step.
        shift = request // len(self.requests) * STRIDE - num_prompt
        of_answer = start + length - answer + (positions + shift) % max(answer, 1)
        of_prompt = prompts[(request * num_prompt + positions) % len(prompts)]
        return np.where(positions < num_prompt, of_prompt, of_answer)

    def uses(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows of every expert, and the sum of their weights, [L, E] each, when these tokens [N]
        are computed together."""
        shape = len(self.layers), self.num_experts
        offsets = np.arange(shape[0])[:, None] * self.num_experts
        chosen = (self.ids[tokens] + offsets).ravel()
        rows = np.bincount(chosen, minlength=shape[0] * shape[1])
        weights = np.bincount(chosen, self.weights[tokens].ravel(), shape[0] * shape[1])
        return rows.reshape(shape), weights.reshape(shape).astype(np.float32)


def _answer(length: int, num_output: int) -> int:
    """Tokens of a recorded request that stand for an answer of so many: at most half of it."""
    return min(num_output, length // 2)


def recorded(trace: RoutingTrace, model: ModelShape, neighbours: bool = False) -> SimulatedRouting:
    """neighbours: the simulated layers follow each other, for who says one from the other. Raises
    MoeserveError where the trace is of another model."""
    sizes = {s.index: s.experts.spec.num_experts for s in model.layers if s.experts is not None}
    check_for_model(trace, sizes, _top_k(model))
    ranks = _sampled(len(sizes), MOST_LAYERS)
    if neighbours:
        ranks = list(range(len(ranks)))
    layers = tuple(list(sizes)[rank] for rank in ranks)
    requests = tuple((r.start, r.length) for r in trace.requests if r.length)
    ids, weights = trace.ids[:, ranks], trace.weights[:, ranks]
    return SimulatedRouting(ids, weights, max(sizes.values()), layers, len(sizes), requests)


def drawn(
    skew: Skew, model: ModelShape, seed: int, most_experts: int = MOST_EXPERTS
) -> SimulatedRouting:
    """Tokens of one long text after another, as `skew` has it, for layers that have no more than so
    many experts all together; two at least."""
    sizes = {s.index: s.experts.spec.num_experts for s in model.layers if s.experts is not None}
    num_experts = max(sizes.values())
    ranks = _sampled(len(sizes), max(2, min(MOST_LAYERS, most_experts // num_experts)))
    layers = tuple(list(sizes)[rank] for rank in ranks)
    ids, weights = _drawn(skew, num_experts, _top_k(model), len(layers), seed)
    return SimulatedRouting(ids, weights, num_experts, layers, len(sizes))


@lru_cache(maxsize=8)
def _drawn(
    skew: Skew, num_experts: int, top_k: int, num_layers: int, seed: int
) -> tuple[Ids, NDArray[np.float32]]:
    """Kept, since every deployment of a plan is simulated with the same ones."""
    rng = np.random.default_rng(seed)
    ids = np.empty((DRAWN_TOKENS, num_layers, top_k), np.int64)
    weights = np.empty(ids.shape, np.float32)
    for rank in range(num_layers):
        logits = skew.popularity * rng.standard_normal(num_experts, np.float32)  # [E]
        logits = logits + np.float32(skew.context) * _drift(rng, num_experts)  # [T, E]
        # of Gumbel's distribution: the largest are a draw without replacement
        logits -= np.log(rng.standard_exponential(logits.shape, np.float32) + LEAST)
        ids[:, rank] = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
        chosen = np.take_along_axis(logits, ids[:, rank], 1)
        chosen = np.exp(chosen - chosen.max(1, keepdims=True))
        weights[:, rank] = chosen / chosen.sum(1, keepdims=True)
    return ids, weights


def _drift(rng: np.random.Generator, num_experts: int) -> NDArray[np.float32]:
    """Unit normal numbers [T, E] that change slowly from token to token."""
    shape = DRAWN_TOKENS // DRIFT_TOKENS + 2, num_experts
    knots = rng.standard_normal(shape, np.float32)
    places = np.arange(DRAWN_TOKENS) / DRIFT_TOKENS
    before = places.astype(np.int64)
    after = (places - before)[:, None].astype(np.float32)
    mixed: NDArray[np.float32] = (1 - after) * knots[before] + after * knots[before + 1]
    mixed /= np.sqrt((1 - after) ** 2 + after**2)
    return mixed


def _sampled(num_layers: int, most: int) -> list[int]:
    """Ranks of the layers that are simulated: all, or some from the first to the last."""
    count = min(num_layers, most)
    return [int(rank) for rank in np.linspace(0, num_layers - 1, count).round()]


def _top_k(model: ModelShape) -> int:
    found: Sequence[int] = [s.experts.top_k for s in model.layers if s.experts is not None]
    return max(found)
