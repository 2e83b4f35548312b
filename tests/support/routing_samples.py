"""Synthetic routing for tests of policies and replays."""

from __future__ import annotations

import numpy as np

from moeserve.cache.routing_trace import Request, RoutingTrace


def topical_trace(
    seed: int, num_tokens: int = 200, num_layers: int = 3, num_experts: int = 12, top_k: int = 3
) -> RoutingTrace:
    """Tokens of changing topics: each topic favours some experts in every layer."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(0, 2, (5, num_layers, num_experts))
    topic = np.repeat(rng.integers(0, 5, num_tokens // 10 + 1), 10)[:num_tokens]
    logits = taste[topic] + rng.gumbel(0, 1, (num_tokens, num_layers, num_experts))
    ids = np.argsort(-logits, axis=2)[..., :top_k]
    weights = np.sort(rng.dirichlet(np.ones(top_k), (num_tokens, num_layers)))[..., ::-1]
    cut = int(rng.integers(1, num_tokens))
    requests = (Request(0, cut, "first"), Request(cut, num_tokens - cut, "second"))
    layers = tuple(range(2, 2 + num_layers))
    return RoutingTrace(
        "topical", ids, weights.astype(np.float32).copy(), requests, num_experts, layers
    )


def trace_of(ids: list[list[list[int]]], num_experts: int) -> RoutingTrace:
    """ids: by token and layer. All weights of a token are the same."""
    array = np.array(ids, np.int64)
    weights = np.full(array.shape, 1 / array.shape[2], np.float32)
    requests = (Request(0, len(array), ""),)
    return RoutingTrace(
        "given", array, weights, requests, num_experts, tuple(range(array.shape[1]))
    )
